"""SLURM's signal to make room, answered between two steps."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning import Trainer

log = logging.getLogger(__name__)


class RequeueBetweenSteps:
    """Puts off what Lightning does on SIGUSR1 under SLURM (save, then requeue the job) to the end of an optimizer step.

    Lightning does it wherever training happens to be: in the middle of a step, whose batch would then be left out, or
    in a validation with averaged weights, which would be saved for the trained ones.  Several processes would each be
    somewhere else, and those of a sharded model would wait for each other for ever; so they tell each other of the
    signal, one number after every optimizer step.
    """

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._asked = False
        self._step = 0

    def start(self, trainer: Trainer) -> None:
        """Take the place of Lightning's handler, where it has one: under SLURM with requeueing."""
        handler = signal.getsignal(signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else None
        if callable(handler) and type(handler).__module__.startswith("lightning."):
            self._handler, self._asked, self._step = handler, False, trainer.global_step
            signal.signal(signal.SIGUSR1, self._take_note)

    def _take_note(self, signum: int, frame: FrameType | None) -> None:
        log.info("signal %d: a checkpoint will be written when the step is done", signum)
        self._asked = True

    def batch_ended(self, trainer: Trainer) -> None:
        """Do what was asked for, if a step has ended with this batch and the processes are agreed."""
        if self._handler is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            self._asked = False
            self._handler(signal.SIGUSR1, None)

    def stop(self) -> None:
        """Give the signal back to Lightning, if that has not yet given it back to whose it was before."""
        if self._handler is not None and signal.getsignal(signal.SIGUSR1) == self._take_note:
            signal.signal(signal.SIGUSR1, self._handler)
        self._handler = None
