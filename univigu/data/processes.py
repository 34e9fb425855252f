"""Worker processes on this machine, and the ranks of torchrun or srun that divide jobs among themselves."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
TORCHRUN = ("RANK", "WORLD_SIZE")
"""Variables with a process's rank and the number of processes, as torchrun sets them."""
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
"""The same of ``srun``.  A batch script has SLURM_PROCID=0 and SLURM_NTASKS, but is no step."""


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SpawnPool:
    """A process pool that starts with its first job.

    Processes are spawned, not forked: they decode videos, and decord's threads do not survive a fork.

    Args:
        workers: number of processes; None is one for every usable core.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers}: expected at least 1")
        self.workers = workers or usable_cores()
        self._executor: ProcessPoolExecutor | None = None

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run ``work(*args)`` in one of the processes."""
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.workers, context, torch.set_num_threads, (1,))
        return self._executor.submit(work, *args)

    def __enter__(self) -> SpawnPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Share:
    """The part of the jobs that this process does: every ``world_size``-th."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"world_size={self.world_size}: expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank}: expected one in [0, {self.world_size})")

    @classmethod
    def from_environment(cls, rank: int | None = None, world_size: int | None = None) -> Share:
        """The given numbers, else those of torchrun, else those of srun, else the only process."""
        by_srun = not any(name in os.environ for name in TORCHRUN) and all(name in os.environ for name in SRUN)
        names = SRUN if by_srun else TORCHRUN
        numbers = []
        for name, given, default in zip(names, (rank, world_size), ("0", "1"), strict=True):
            text = os.environ.get(name, default)
            if given is None and not text.isdecimal():
                raise ValueError(f"{name}={text!r}: expected a number")
            numbers.append(int(text) if given is None else given)
        return cls(*numbers)

    def of(self, jobs: Sequence[Item]) -> list[Item]:
        """This process's part of the jobs."""
        return list(jobs[self.rank :: self.world_size])


ONLY = Share()
"""The only process."""


def this_device() -> str:
    """The GPU that belongs to this process by LOCAL_RANK or SLURM_LOCALID, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    number = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return f"cuda:{int(number) % torch.cuda.device_count()}"


def progress_bar() -> Progress:
    """A bar on standard error with counts and the remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
