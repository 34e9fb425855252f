"""One checkpoint, always whole, always the newest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from univigu.callbacks.requeue import RequeueBetweenSteps
from univigu.parallel import is_sharded


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` up to date: every n optimizer steps, and when training ends.

    ModelCheckpoint alone would leave out what was learned since the last multiple of n.  Under SLURM it also sees to it
    that a job asked to make room saves between two steps, see :class:`RequeueBetweenSteps`.

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
        self._requeue = RequeueBetweenSteps()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._requeue.start(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._requeue.batch_ended(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._requeue.stop()
        super().teardown(trainer, pl_module, stage)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """A sharded checkpoint is a folder: it appears under its name once every process has written its part."""
        if not is_sharded(trainer.lightning_module.transformer):  # type: ignore[arg-type]
            super()._save_checkpoint(trainer, filepath)
            return
        target, part, old = (Path(f"{filepath}{suffix}") for suffix in ("", ".part", ".old"))
        if trainer.is_global_zero:
            _remove(part)
        super()._save_checkpoint(trainer, str(part))
        self._last_checkpoint_saved = filepath
        trainer.strategy.barrier("checkpoint written")
        if trainer.is_global_zero:
            _remove(old)
            if target.exists():
                target.replace(old)
            part.replace(target)
            _remove(old)
        trainer.strategy.barrier("checkpoint in place")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not trainer.fast_dev_run and self._last_global_step_saved != trainer.global_step:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def _remove(path: Path) -> None:
    """A checkpoint of either kind, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
