"""One checkpoint, always whole, always the newest."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` up to date: every n optimizer steps, and when training ends.

    ModelCheckpoint alone would leave out what was learned since the last multiple of n.

    Args:
        dirpath: folder; None is ``checkpoints`` in ``trainer.default_root_dir``.
        every_n_train_steps: optimizer steps between two saves.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 200) -> None:
        super().__init__(
            dirpath=dirpath,
            save_last=True,
            save_top_k=0,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not trainer.fast_dev_run and self._last_global_step_saved != trainer.global_step:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
