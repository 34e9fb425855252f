"""Where the jobs of ``univigu.data.shards.build_folder`` run: here, in worker processes, or on a Ray cluster."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from univigu.data.options import check_least
from univigu.data.shards import Engine, ShardInfo, Work

JOBS = 2
"""Jobs of an actor at a time: while one uses a model, the other reads, writes, or uses another model."""
_locks = defaultdict[str, Any](threading.RLock)


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


@contextmanager
def exclusive(model: str) -> Iterator[None]:
    """A context, or decorator, of one thread at a time, since the jobs of an actor share each model."""
    with _locks[model]:
        yield


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``open_engine``."""
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: needs univigu[cluster]")
    parser.add_argument("--address", help="of a Ray cluster, or auto; default: RAY_ADDRESS, or Ray on this machine")
    parser.add_argument("--workers", type=int, help="actors with the models; default: one a GPU, or else a core")
    parser.add_argument("--device", help="default: a GPU if there is one, else cpu")


def open_engine(options: argparse.Namespace, processes: bool = False) -> tuple[Engine, str]:
    """The engine of these options, and its models' device; ``processes``: the number of workers is also local."""
    if options.engine == "ray":
        engine = RayEngine(options.address, options.workers)
        return engine, options.device or engine.device
    for name in ("address", *(() if processes else ("workers",))):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}={getattr(options, name)!r}: needs --engine ray")
    return map, options.device or this_device()


class RayEngine:
    """Applies work to jobs on Ray, in actors that each hold the work with its models; see ``add_engine``."""

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise ValueError("engine='ray': Ray is missing; pip install \"univigu[cluster]\"") from error
        if not ray.is_initialized():
            ray.init(address)
        resources = ray.cluster_resources()
        self.device = "cuda" if "GPU" in resources else "cpu"
        self.workers = int(resources.get("GPU", resources.get("CPU", 1))) if workers is None else workers
        check_least(self, workers=1)

    def __call__(self, work: Work, paths: Sequence[Path], jobs: Sequence[Any]) -> Iterator[ShardInfo]:
        import ray

        options = {"num_cpus": 0, "num_gpus": int(self.device == "cuda"), "scheduling_strategy": "SPREAD"}
        options |= {"max_concurrency": JOBS, "max_restarts": -1, "max_task_retries": 3}  # of lost processes, not errors
        host: Any = ray.remote(_Host).options(**options)
        shared = ray.put(work)
        actors = [host.remote(os.getcwd(), shared) for _ in range(self.workers)]
        pool: Any = ray.util.ActorPool(actors * JOBS)
        try:
            yield from pool.map_unordered(lambda actor, job: actor.run.remote(*job), zip(paths, jobs, strict=True))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        finally:
            for actor in actors:
                ray.kill(actor)


class _Host:
    """An actor that does jobs; ``folder`` is that of the driver, for relative paths."""

    def __init__(self, folder: str, work: Work) -> None:
        os.chdir(folder)
        torch.set_num_threads(1)
        self.work = work

    def run(self, path: Path, job: Any) -> ShardInfo:
        return self.work(path, job)
