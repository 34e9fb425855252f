"""The unified model can learn: eight clips, captioned from the video alone, every caption exact."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import REPO
from univigu.training.lightning_cli import UniViGUCLI

CALLBACKS = """
trainer:
  callbacks:
    - class_path: univigu.training.callbacks.StageSwitch
      init_args:
        stages:
          - {name: overfit, steps: 120, target: prompt, text_length: 32, condition_dropout: {joint: 1, understand: 1},
             warmup_steps: 20, tasks: {joint: 0, understand: 1, generate: 0}, learning_rate: 1.0e-3,
             text_learning_rate: 6.0e-3}
"""


def test_overfitting_eight_clips(in_tmp: Path, small_data: list[str]) -> None:
    Path("callbacks.yaml").write_text(CALLBACKS)
    cli = UniViGUCLI(
        [
            "fit", f"--config={REPO}/configs/recall.yaml", "--config=callbacks.yaml", *small_data,
            "--data.batch_size=8",
            "--trainer.limit_val_batches=0", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
            "--trainer.enable_checkpointing=false",
        ]
    )  # fmt: skip
    (batch,) = list(cli.datamodule.train_dataloader())
    cli.model.eval()
    captions = cli.model.caption(batch["latents"], 128, seeds=list(range(8)))
    assert captions == batch["prompt"]
