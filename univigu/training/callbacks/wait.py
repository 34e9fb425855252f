"""How long training has waited for data."""

from __future__ import annotations

import time

from lightning import Trainer


class DataWait:
    """Seconds in which training waited for its next batch.

    A loader that counts them itself is asked (``waited``, see :class:`univigu.data.loader.TrainLoader`).  With any
    other the time between two batches counts, in which other callbacks may have been at work, too.
    """

    def __init__(self) -> None:
        self._between = self._before = 0.0
        self._ended = time.perf_counter()

    def start(self, trainer: Trainer) -> None:
        """Count from now on."""
        self._between, self._before = 0.0, _waited(trainer) or 0.0
        self._ended = time.perf_counter()

    def batch_started(self) -> None:
        self._between += time.perf_counter() - self._ended

    def batch_ended(self) -> None:
        self._ended = time.perf_counter()

    def take(self, trainer: Trainer) -> float:
        """The seconds since the start or the last time that they were taken."""
        waited = _waited(trainer)
        seconds = self._between if waited is None else waited - self._before
        self.start(trainer)
        return seconds


def _waited(trainer: Trainer) -> float | None:
    return getattr(trainer.train_dataloader, "waited", None)
