"""Where the jobs of ``univigu.data.shards.build_folder`` run: here, in worker processes, or as tasks on a Ray cluster.

On Ray a job is a task, and actors hold the models that it uses.  Several jobs run at the same time, so generating,
captioning, encoding and writing overlap.  Ray repeats what a lost worker or machine has not finished.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from univigu.data.options import check_least
from univigu.data.shards import Engine, ShardInfo, Work

RETRIES = 3
"""How often Ray repeats a job, or a call of a model, whose process was lost; it does not repeat errors."""


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


class Model:
    """A model whose methods may be called from another process; it loads its weights when it is first used."""


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add ``--engine``, ``--address``, ``--workers`` and ``--device``."""
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: needs univigu[cluster]")
    parser.add_argument("--address", help="of a Ray cluster, or auto; default: RAY_ADDRESS, or Ray on this machine")
    parser.add_argument("--workers", type=int, help="actors of each model; default: one a GPU, or else a core")
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
    """Applies work to jobs on Ray; the work's attributes of the class ``Model`` become actors.

    Args:
        address: of a running cluster; None starts Ray on this machine, unless RAY_ADDRESS is set or Ray is running.
        workers: actors of each model; None is one a GPU, or else a core.  One of each model share a GPU.
    """

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
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        models = {name: value for name, value in vars(work).items() if isinstance(value, Model)}
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": RETRIES}
        group = None
        if models and self.device == "cuda":
            options["num_gpus"] = 1 / len(models)
            group = ray.util.placement_group([{"GPU": 1}] * self.workers)
        lanes = []
        for number in range(self.workers):
            place = "SPREAD" if group is None else PlacementGroupSchedulingStrategy(group, number)
            host: Any = ray.remote(_Host).options(scheduling_strategy=place, **options)
            lane: Any = copy(work)
            for name, model in models.items():
                setattr(lane, name, _Remote(host.remote(os.getcwd(), model)))
            lanes.append(ray.put(lane))
        free = lanes * 2  # while one job uses a model, the other reads, writes, or uses another model
        write = ray.remote(_write).options(max_retries=RETRIES, scheduling_strategy="SPREAD")
        todo, running = iter(zip(paths, jobs, strict=True)), dict[Any, Any]()
        try:
            while True:
                for path, job in islice(todo, len(free)):
                    lane = free.pop(0)
                    running[write.remote(os.getcwd(), lane, path, job)] = lane
                if not running:
                    return
                (done, *_), _ = ray.wait(list(running))
                free.append(running.pop(done))
                yield _result(done)
        finally:
            if group is not None:
                ray.util.remove_placement_group(group)  # ends its actors


class _Host:
    """An actor that holds a model."""

    def __init__(self, folder: str, model: Model) -> None:
        _start(folder)
        self.model = model

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, method)(*args, **kwargs)


class _Remote:
    """Stands for a model that an actor holds: a method's call waits for the actor's result."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)  # pickle asks for these
        return lambda *args, **kwargs: _result(self._actor.call.remote(method, *args, **kwargs))


def _write(folder: str, work: Work, path: Path, job: Any) -> ShardInfo:
    _start(folder)
    return work(path, job)


def _start(folder: str) -> None:
    os.chdir(folder)  # that of the driver, for relative paths
    torch.set_num_threads(1)


def _result(reference: Any) -> Any:
    """The result of a task or call; its error is raised as it was there."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
