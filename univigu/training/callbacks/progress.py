"""The progress of fit, validate, test and predict where output is no terminal."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import TaskID

from univigu.data.progress import LineProgress


class ProgressLines(ProgressBar):
    """Prints a line every few seconds: step, stage, losses, clips a second, time left; in place of Lightning's bar."""

    def __init__(self, seconds: float = 5.0) -> None:
        super().__init__()
        self.progress, self._enabled = LineProgress(seconds), True
        self.progress.disable = True  # no bar, whatever standard error is

    def disable(self) -> None:
        """Lightning calls it on all processes but the first."""
        self._enabled = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._task: TaskID | None = None

    def _advance(
        self, trainer: Trainer, batch: Any, description: str, total: float, done: int = 0, batches: int = 1
    ) -> None:
        """Count a step (of some batches), or a batch; ``done`` were counted before the first."""
        if not self._enabled:
            return
        if self._task is None:
            self._task = self.progress.add_task(description, total=total, completed=done)
        self.progress.update(self._task, description=description)
        clips = len(batch["key"] if "key" in batch else batch["index"]) * batches * trainer.world_size
        self.progress.advance(self._task, 1, trainer.progress_bar_metrics, clips)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, batches = trainer.global_step, trainer.accumulate_grad_batches
        if (batch_idx + 1) % batches == 0:
            self._advance(trainer, batch, f"fit {pl_module.stage_name}", trainer.max_steps, step - 1, batches)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._advance(trainer, args[2], "validate", sum(trainer.num_val_batches))

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._advance(trainer, args[2], "test", sum(trainer.num_test_batches))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self._advance(trainer, args[1], f"predict {pl_module.predict_task}", sum(trainer.num_predict_batches))
