"""Checkpoints of a training: one file or folder, always complete, always the newest."""

from __future__ import annotations

import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from univigu.training.parallel import is_sharded

log = logging.getLogger(__name__)


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` up to date: every n optimizer steps, and when training ends.

    The last step is saved before any callback's ``on_train_end``, where averaged weights replace the trained ones, to
    which the optimizer's state belongs. So a run that was cut short is resumed exactly, too.

    Under SLURM Lightning answers SIGUSR1 (save, then requeue the job) at once: within a step, whose batch would then be
    skipped, or in a validation, which would save averaged weights as trained ones, and on each process at another
    time, where those of a sharded model would wait for each other for ever. This callback postpones it to the end of
    the optimizer step, at which the processes agree on the signal.

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
        self._requeue: Callable[[int, FrameType | None], Any] | None = None  # Lightning's handler
        self._signaled = False
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    # ---------------------------------------------------------------- SLURM's signal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        handler = signal.getsignal(signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else None
        if callable(handler) and type(handler).__module__.startswith("lightning."):
            self._requeue, self._signaled, self._step = handler, False, trainer.global_step
            signal.signal(signal.SIGUSR1, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        log.info("signal %d: a checkpoint will be written when the step is done", signum)
        self._signaled = True

    def _requeue_if_signaled(self, trainer: Trainer) -> None:
        if self._requeue is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self._signaled, all=False):
            self._signaled = False
            self._requeue(signal.SIGUSR1, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._requeue is not None and signal.getsignal(signal.SIGUSR1) == self._on_signal:
            signal.signal(signal.SIGUSR1, self._requeue)  # unless Lightning has restored the handler before it
        self._requeue = None
        super().teardown(trainer, pl_module, stage)

    # ---------------------------------------------------------------- saving

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if _stops(trainer):
            self._save_once(trainer)
        self._requeue_if_signaled(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if _stops(trainer):
            self._save_once(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if _stops(trainer):
            counts = trainer.fit_loop.epoch_progress
            counts.increment_completed()  # as after this hook: a resumed run must not end this epoch again
            self._save_once(trainer)
            for count in (counts.total, counts.current):
                count.completed -= 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a last step that no earlier hook took for the last; unlike the base class, not under fast_dev_run."""
        self._save_once(trainer)

    def _save_once(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """A sharded checkpoint is a folder: it gets its name once every process has written its part."""
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


def _stops(trainer: Trainer) -> bool:
    """Whether this batch is the last, as far as is known by now: a time limit or a validation may stop it later."""
    loop, epochs = trainer.fit_loop, trainer.fit_loop.epoch_progress.current.ready
    if (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps) or (
        trainer.should_stop and loop._can_stop_early
    ):
        return True
    last_epoch = loop.max_epochs not in (None, -1) and epochs >= loop.max_epochs
    return last_epoch and loop.epoch_loop._num_ready_batches_reached()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
