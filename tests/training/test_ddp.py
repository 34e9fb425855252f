"""Plain data parallelism (what Lightning takes for several devices): stages freeze and unfreeze weights under it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader, Subset

from tests.conftest import run_ranks
from tests.training import test_parallel as parts
from univigu.flow import objective
from univigu.training.stages import StageSwitch

STAGES = {name: replace(stage, steps=4) for name, stage in parts.STAGES.items()}


def train(folder: str, processes: int) -> tuple[Any, dict[str, float]]:
    """A run through both stages, the generator frozen in the first; one process takes a step of two."""
    torch.set_num_threads(1)
    module = (parts.UniViGU if processes == 2 else parts.AsTwo)(folder, optimizer=parts.ADAMW, seed=3)
    diary = parts.Diary()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes == 2 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[StageSwitch(STAGES), diary],
    )
    clips, size = parts.Clips(), parts.BATCH
    own = Subset(clips, range(trainer.global_rank, len(clips), 2)) if processes == 2 else clips
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "MAX_LOGITS", 500)  # the loss is computed in parts
        trainer.fit(module, DataLoader(own, batch_size=size if processes == 2 else 2 * size))
    total = {name: value.double().sum().item() for name, value in module.transformer.state_dict().items()}
    return diary, total


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    parts.tiny.make_pipeline().save_pretrained(tmp_path / "foundation")
    run_ranks(train_share, str(tmp_path / "foundation"), tmp_path)
    diary, weights = train(str(tmp_path / "foundation"), 1)
    steps = sum(stage.steps for stage in STAGES.values())
    assert sorted(diary.losses) == list(range(steps))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    for name, value in weights.items():
        assert ranks[0]["weights"][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    for step in range(steps):
        mean = sum(rank["losses"][str(step)] for rank in ranks) / 2
        assert mean == pytest.approx(diary.losses[step], rel=1e-4), step
    assert [diary.moved[step] for step in range(1, steps)] == [False] * 3 + [True] * 4


def train_share(folder: str, output: Path) -> None:
    diary, weights = train(folder, 2)
    rank = torch.distributed.get_rank()
    (output / f"{rank}.json").write_text(json.dumps({"losses": diary.losses, "weights": weights}))
