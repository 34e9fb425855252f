"""The unified model can learn: four clips, captioned from the video alone, every caption exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import REPO
from univigu.training.lightning_cli import UniViGUCLI

STAGE = """
run: [overfit]
stages:
  overfit: {steps: 120, text_length: 32, condition_dropout: {understand: 1}, warmup_steps: 10,
            tasks: {joint: 0, understand: 1, generate: 0}, learning_rate: 0, text_learning_rate: 6.0e-3}
"""


@pytest.mark.slow
def test_overfitting_four_clips(in_tmp: Path, small_data: list[str]) -> None:
    Path("stage.yaml").write_text(STAGE)
    cli = UniViGUCLI(
        [
            "fit",
            f"--config={REPO}/configs/recall.yaml",
            f"--config={REPO}/configs/frozen.yaml",
            "--config=stage.yaml",
            *small_data,
            f"--data.root={in_tmp}/data",
            "--data.num_train_clips=4",
            "--data.num_frames=5",
            "--model.sampling.caption_steps=8",
            "--trainer.limit_val_batches=0",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_checkpointing=false",
        ]
    )
    (batch,) = list(cli.datamodule.train_dataloader())
    cli.model.eval()
    tasks = cli.model.tasks
    samples = tasks.sample("caption", None, 32, latents=batch["latents"], generator=tasks.generators(range(4)))
    assert tasks.texts(samples) == batch["prompt"]
