"""The unified model can learn: eight clips, captioned from the video alone, every caption exact."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import REPO
from univigu.training.lightning_cli import UniViGUCLI

STAGE = """
run: [overfit]
stages:
  overfit: {steps: 120, text_length: 32, condition_dropout: {understand: 1}, warmup_steps: 20,
            tasks: {joint: 0, understand: 1, generate: 0}, learning_rate: 1.0e-3}
"""


def test_overfitting_eight_clips(in_tmp: Path, small_data: list[str]) -> None:
    Path("stage.yaml").write_text(STAGE)
    cli = UniViGUCLI(
        [
            "fit",
            f"--config={REPO}/configs/recall.yaml",
            f"--config={REPO}/configs/frozen.yaml",
            "--config=stage.yaml",
            *small_data,
            "--data.batch_size=8",
            "--trainer.limit_val_batches=0",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_checkpointing=false",
        ]
    )
    (batch,) = list(cli.datamodule.train_dataloader())
    cli.model.eval()
    captions = cli.model.caption(batch["latents"], 128, seeds=list(range(8)))
    assert captions == batch["prompt"]
