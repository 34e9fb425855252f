"""What an epoch held, in the logs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from tests.conftest import run_ranks
from univigu.data.buckets import Bucket
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.options import LengthFilter
from univigu.data.shards import write_shard
from univigu.data.sources import Source
from univigu.shapes.write import write_shapes
from univigu.training.callbacks.monitor import DataStatistics


class Seen(LightningModule):
    """Learns nothing and notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One source of 9 wide clips, one of 5 square ones."""
    made = [tmp_path_factory.mktemp(name) for name in ("wide", "square")]
    for folder, count, width in ((made[0], 9, 64), (made[1], 5, 32)):
        write_shapes(folder / "train", "train", count, height=32, width=width, num_frames=5)
        write_shapes(folder / "val", "val", 6, height=32, width=width, num_frames=5)
    return made


def make(folders: list[Path]) -> VideoTextDataModule:
    return VideoTextDataModule(
        shards=[Source(str(folder), weight) for folder, weight in zip(folders, (1.0, 2.0), strict=True)],
        buckets=[Bucket(32, 64, 5), Bucket(32, 32, 5)],
        batch_size=2,
        num_workers=0,
        prompt_length=64,
        precompute=False,
        length_filter=LengthFilter(max_caption=200),
    )


@pytest.fixture(scope="module")
def length(folders: list[Path]) -> int:
    """Batches an epoch."""
    data = make(folders)
    data.setup("fit")
    return len(data.train_dataloader())


def fit(folders: list[Path], log: Path, steps: int, ckpt: Path | None = None) -> tuple[Seen, VideoTextDataModule]:
    data = make(folders)
    model, checkpoint = Seen(), ModelCheckpoint(log, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(str(log), name=None, version="tb"),
        callbacks=[checkpoint, DataStatistics()],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=str(log),
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt)
    return model, data


def logged(log: Path, step: int) -> dict[str, float]:
    found = EventAccumulator(str(log / "tb"), size_guidance={"scalars": 0})
    found.Reload()
    scalars = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"] if tag.startswith("data/")}
    return {tag: e.value for tag, rows in scalars.items() for e in rows if e.step == step}


def test_every_epoch_is_told(folders: list[Path], length: int, tmp_path: Path) -> None:
    model, data = fit(folders, tmp_path, 3 * length)
    for number in range(3):
        step = (number + 1) * length
        batches = model.batches[number * length : step]
        keys = [pair for b in batches for pair in zip(b["source"], b["key"], strict=True)]
        sources, buckets = Counter(source for source, _ in keys), Counter(n for b in batches for n in b["bucket"])
        values = logged(tmp_path, step)
        assert values["data/epoch/samples"] == len(keys)
        assert values["data/epoch/repeated"] == len(keys) - len(set(keys)) > 0
        assert [values[f"data/epoch/source_{i}"] for i in (0, 1)] == [sources[0], sources[1]]
        assert [values[f"data/epoch/bucket_{b}"] for b in ("32x64x5", "32x32x5")] == [buckets[0], buckets[1]]
        assert values["data/filtered/caption_long"] == data.filter_counts["train"]["caption_long"] > 0


def test_a_resumed_epoch_is_told_whole(folders: list[Path], length: int, tmp_path: Path) -> None:
    fit(folders, tmp_path / "whole", length)
    fit(folders, tmp_path / "rest", length, tmp_path / "whole" / f"step={length - 2}.ckpt")
    expected = logged(tmp_path / "whole", length)
    assert expected["data/epoch/samples"] == 2 * length
    assert logged(tmp_path / "rest", length) == expected


def fit_share(shards: Path, log: Path) -> None:
    """An epoch on this process's share of the samples, with a log of what it could not use."""
    data = VideoTextDataModule(
        shards=str(shards), height=32, width=32, num_frames=5, batch_size=2, num_workers=0, precompute=False, seed=2
    )
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=TensorBoardLogger(str(log), name=None, version="tb"),
        callbacks=[DataStatistics()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(Seen(), datamodule=data)
    (log / f"unusable-{trainer.global_rank}").write_text(str(sum(trainer.train_dataloader.errors.counts.values())))


@pytest.mark.slow
def test_unusable_samples_of_all_processes_are_counted(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shapes(tmp_path / "shards" / split, "train", 8, height=32, width=32, num_frames=5)
        (tmp_path / "shards" / split / "manifest.json").unlink()  # to which another shard would be damage
    texts = {"prompt": "a red circle", "caption": "red " * 150}
    broken = [(f"broken{i}", {"mp4": b"no video", "json": json.dumps(texts).encode()}) for i in range(4)]
    write_shard(tmp_path / "shards" / "train" / "broken.tar", broken)
    run_ranks(fit_share, tmp_path / "shards", tmp_path)
    own = [int((tmp_path / f"unusable-{rank}").read_text()) for rank in (0, 1)]
    assert 0 < own[0] < 4  # the first process has not met all
    assert logged(tmp_path, 3)["data/unusable/unreadable_video"] == 4


def test_other_data_are_left_alone(tmp_path: Path) -> None:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(str(tmp_path)),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DataStatistics()],
    )
    model = Seen()
    trainer.fit(model, DataLoader([{"x": torch.zeros(1)}] * 2))  # type: ignore[arg-type]
    assert len(model.batches) == 2 and not any(name.startswith("data/") for name in trainer.logged_metrics)
