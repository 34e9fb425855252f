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
from lightning.pytorch.callbacks import Checkpoint

from univigu.training.parallel import is_sharded

log = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` up to date: every n optimizer steps, and when training ends.

    Under SLURM Lightning answers SIGUSR1 (save, then requeue the job) at once: within a step, whose batch would then be
    skipped, or in a validation, which would save averaged weights as trained ones, and on each process at another
    time, where those of a sharded model would wait for each other for ever. This callback postpones it to the end of
    the optimizer step, at which the processes agree on the signal.

    Args:
        dirpath: folder; None is ``checkpoints`` in ``trainer.default_root_dir``.
        every_n_train_steps: optimizer steps between two saves.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 200) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps={every_n_train_steps}: expected at least 1")
        self.dirpath, self.every_n_train_steps = dirpath, every_n_train_steps
        self.last_model_path = ""
        self._requeue: Callable[[int, FrameType | None], Any] | None = None  # Lightning's handler
        self._signaled = False
        self._step = self._saved_step = 0

    # ---------------------------------------------------------------- SLURM's signal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = self._saved_step = trainer.global_step
        handler = signal.getsignal(signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else None
        if callable(handler) and type(handler).__module__.startswith("lightning."):
            self._requeue, self._signaled = handler, False
            signal.signal(signal.SIGUSR1, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        log.info("signal %d: a checkpoint will be written when the step is done", signum)
        self._signaled = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._requeue is not None and signal.getsignal(signal.SIGUSR1) == self._on_signal:
            signal.signal(signal.SIGUSR1, self._requeue)  # unless Lightning has restored the handler before it
        self._requeue = None

    # ---------------------------------------------------------------- saving

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:  # gradients are still being accumulated
            return
        self._step = step
        if step % self.every_n_train_steps == 0:
            self._save(trainer)
        if self._requeue is not None and trainer.strategy.reduce_boolean_decision(self._signaled, all=False):
            self._signaled = False
            self._requeue(signal.SIGUSR1, None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Save this step, once; a sharded checkpoint is a folder, named when every process has written its part."""
        if trainer.fast_dev_run or self._saved_step == trainer.global_step:  # type: ignore[attr-defined]
            return
        self._saved_step = trainer.global_step
        target = Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints") / "last.ckpt"
        self.last_model_path = str(target)
        if not is_sharded(trainer.lightning_module.transformer):  # type: ignore[arg-type]
            trainer.save_checkpoint(target)
            return
        part, old = (target.with_suffix(suffix) for suffix in (".part", ".old"))
        if trainer.is_global_zero:
            _remove(part)
        trainer.save_checkpoint(part)
        trainer.strategy.barrier("checkpoint written")
        if trainer.is_global_zero:
            _remove(old)
            if target.exists():
                target.replace(old)
            part.replace(target)
            _remove(old)
        trainer.strategy.barrier("checkpoint in place")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
