"""Worker processes on this machine, and the ranks of torchrun or srun that share jobs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

TORCHRUN = ("RANK", "WORLD_SIZE")
"""Variables with a process's rank and the number of processes, as torchrun sets them."""
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
"""The same of ``srun``.  A batch script has SLURM_PROCID=0 and SLURM_NTASKS, but is no step."""


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker(number: int = 0) -> None:
    """Set up a worker process: one thread, and it ends with the process that started it, even if that is killed.

    A signal to all of them (Ctrl-C, a scheduler's SIGTERM) is that process's to answer; a worker obeys only its own.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # else every SIGTERM ends a worker
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # in the thread, too, which waits for it
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        if not hasattr(signal, "sigtimedwait"):
            time.sleep(1)
        elif (received := signal.sigtimedwait([signal.SIGTERM], 1)) and received.si_pid == parent:
            break
    os._exit(0)  # for another code a DataLoader raises


class SpawnPool(ProcessPoolExecutor):
    """Spawned processes of one torch thread each, started by the first job; by default one for every usable core."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = usable_cores() if workers is None else workers
        super().__init__(self.workers, multiprocessing.get_context("spawn"), start_worker)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        """Wait for the jobs that run; after an error or a signal not for those that have not begun."""
        self.shutdown(cancel_futures=kind is not None)


@dataclass(frozen=True)
class Share:
    """This process's share of the jobs: every ``world_size``-th, from number ``rank``."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank}: expected one in [0, {self.world_size}), world_size={self.world_size}")

    @classmethod
    def from_environment(cls, rank: int | None = None, world_size: int | None = None) -> Share:
        """The given numbers, else those of torchrun, else those of srun, else the only process."""
        by_srun = not any(name in os.environ for name in TORCHRUN) and all(name in os.environ for name in SRUN)
        numbers = []
        for name, given, default in zip(SRUN if by_srun else TORCHRUN, (rank, world_size), "01", strict=True):
            text = os.environ.get(name, default) if given is None else str(given)
            if not text.removeprefix("-").isdecimal():
                raise ValueError(f"{name}={text!r}: expected a number")
            numbers.append(int(text))
        return cls(*numbers)


ONLY = Share()
"""The only process."""


def this_device() -> str:
    """The GPU that belongs to this process by LOCAL_RANK or SLURM_LOCALID, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    number = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return f"cuda:{int(number) % torch.cuda.device_count()}"
