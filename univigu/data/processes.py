"""Worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


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
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = cores if workers is None else workers
        super().__init__(self.workers, multiprocessing.get_context("spawn"), start_worker)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        """Wait for the jobs that run; after an error or a signal not for those that have not begun."""
        self.shutdown(cancel_futures=kind is not None)


def this_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
