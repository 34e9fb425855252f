"""Checkpoints of a training: one file or folder, always complete, always the newest."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.fsdp import FSDPModule

from univigu.training.stages import ends_step

log = logging.getLogger(__name__)

FOLDER, LAST, OLD = "checkpoints", "last.ckpt", ".old"


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` up to date: every n optimizer steps, and when training ends.

    SIGTERM and SIGINT end the training after the optimizer step, whose checkpoint is saved; the exit code is that of
    the signal (143, 130). A second signal ends it at once.

    Under SLURM SIGUSR1 waits for the end of the step, too. Lightning answers it (save, then requeue the job) at once:
    within a step, whose batch would be skipped; in a validation, which would save averaged weights as trained ones; and
    on each process at another time, where those of a sharded model would wait for each other for ever.

    Args:
        dirpath: folder; None is ``checkpoints`` in ``trainer.default_root_dir``.
        every_n_train_steps: optimizer steps between two saves.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 200) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps={every_n_train_steps}: expected at least 1")
        self.dirpath, self.every_n_train_steps = dirpath, every_n_train_steps
        self.last_model_path = self.best_model_path = ""  # read by Lightning
        self._earlier: dict[int, Any] = {}  # handlers by signal
        self._signal = self._saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step, self._signal = trainer.global_step, 0
        # Already here: reports at the end of training name it, and Lightning calls this callback after them.
        self.last_model_path = str(Path(self.dirpath or Path(trainer.default_root_dir) / FOLDER) / LAST)
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [signal.SIGTERM, signal.SIGINT]
        if type(signal.getsignal(signal.SIGUSR1)).__module__.startswith("lightning."):  # under SLURM
            numbers.append(signal.SIGUSR1)
        self._earlier = {number: signal.signal(number, self._on_signal) for number in numbers}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signal in (signal.SIGTERM, signal.SIGINT):
            raise SystemExit(128 + signum)
        log.warning("signal %d: a checkpoint will be written when the step is done", signum)
        self._signal = signum

    def _answer_signals(self, trainer: Trainer) -> None:
        number = self._signal
        if trainer.world_size > 1:  # all processes answer the signals of any
            device = trainer.strategy.root_device
            number = int(trainer.strategy.reduce(torch.tensor(number, device=device), reduce_op="max"))
        self._signal = 0
        if number == signal.SIGUSR1:
            self._earlier[number](number, None)
        elif number:
            self._save(trainer)
            log.warning("signal %d: training ends after step %d", number, trainer.global_step)
            # Lightning's launcher takes another code than 0 of one of its processes for a crash, and kills them all.
            raise SystemExit(128 + number if trainer.is_global_zero else 0)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._earlier.items():
            if signal.getsignal(number) == self._on_signal:  # unless Lightning has restored the handler before it
                signal.signal(number, handler)
        self._earlier = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not ends_step(trainer, batch_idx):
            return
        if trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)
        self._answer_signals(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Save this step, once; a folder (of a sharded model) is named when every process has written its part."""
        if trainer.fast_dev_run or self._saved_step == trainer.global_step:  # type: ignore[attr-defined]
            return
        self._saved_step = trainer.global_step
        target = Path(self.last_model_path)
        if not isinstance(trainer.lightning_module.transformer, FSDPModule) and not target.is_dir():
            trainer.save_checkpoint(target, weights_only=False)
            return
        part, old = (target.with_suffix(suffix) for suffix in (".part", OLD))
        if trainer.is_global_zero:
            _remove(part)
        trainer.save_checkpoint(part, weights_only=False)
        trainer.strategy.barrier("checkpoint written")
        if trainer.is_global_zero:
            if target.exists():  # else the old one stays until the new one has its name
                _remove(old)
                target.replace(old)
            part.replace(target)
            _remove(old)
        trainer.strategy.barrier("checkpoint in place")


def find_last(folder: Path) -> Path:
    """Where the last checkpoint of a folder is, or will be; a kill while a sharded one is replaced leaves the old."""
    last = folder / LAST
    return next((path for path in (last, last.with_suffix(OLD)) if path.exists()), last)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
