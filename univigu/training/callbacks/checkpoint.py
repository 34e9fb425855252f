"""One checkpoint, always whole, always the newest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from univigu.training.callbacks.requeue import RequeueBetweenSteps
from univigu.training.parallel import is_sharded


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` up to date: every n optimizer steps, and when training ends.

    ModelCheckpoint alone would leave out what was learned since the last multiple of n.  The last step is saved before
    any callback's ``on_train_end``, where averaged weights take the place of the trained ones, to which the optimizer's
    state belongs: so a run that was cut short goes on exactly, too.  Under SLURM it also sees to it that a job asked to
    make room saves between two steps, see :class:`RequeueBetweenSteps`.

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
        if _stops(trainer):
            self._save_once(trainer)
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

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if _stops(trainer):
            self._save_once(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if _stops(trainer):
            counts = trainer.fit_loop.epoch_progress
            counts.increment_completed()  # as after this hook: a resumed run must not go through this end again
            self._save_once(trainer)
            for count in (counts.total, counts.current):
                count.completed -= 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what no hook before saw to be the last step; unlike the base class, nothing under fast_dev_run."""
        self._save_once(trainer)

    def _save_once(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def _stops(trainer: Trainer) -> bool:
    """Whether this batch is the last, as far as is known by now: time may be up, or a validation say so later."""
    loop = trainer.fit_loop
    steps_done = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return steps_done or (trainer.should_stop and loop._can_stop_early) or _ends_last_epoch(trainer)


def _ends_last_epoch(trainer: Trainer) -> bool:
    loop = trainer.fit_loop
    epochs, limit = loop.epoch_progress.current.ready, loop.max_epochs
    return limit is not None and limit != -1 and epochs >= limit and loop.epoch_loop._num_ready_batches_reached()


def _remove(path: Path) -> None:
    """A checkpoint of either kind, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
