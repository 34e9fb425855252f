"""Shared fixtures: the shipped foundation, and small runs of the real command line."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Before anything that reads them is imported: no test asks the network; each worker of pytest-xdist has one core and
# one thread, as have the processes that it starts (several workers on the same cores wait for each other, and a pool of
# processes as large as the machine costs each of them the seconds of its imports).
os.environ["HF_HUB_OFFLINE"] = "1"
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import pytest
import torch
from torch.multiprocessing import start_processes

from univigu.data.engine import SpawnPool

REPO = Path(__file__).resolve().parents[1]
SMALL = {"num_train_clips": 8, "num_val_clips": 4, "batch_size": 4, "num_workers": 0}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in workers: a fork cannot use the threads of its parent, and other numbers of threads give other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs of the command line are slow; files with many slow tests first, so that no worker is alone with them."""
    for item in items:
        if "small_data" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """Garbage collections leave out the million objects of imported modules, which take 0.3 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


@pytest.fixture(scope="session")
def foundation() -> str:
    """Path of a foundation folder in WanPipeline layout; UNIVIGU_FOUNDATION names another than the shipped one."""
    from univigu.models.foundation import EMBEDDED_FOUNDATION  # heavy, and many tests need none

    return os.environ.get("UNIVIGU_FOUNDATION", EMBEDDED_FOUNDATION)


class RealPool(SpawnPool):
    """A pool that does start processes, see :func:`_jobs_are_done_here`."""

    submit = SpawnPool.submit


@pytest.fixture(scope="session", autouse=True)
def _jobs_are_done_here() -> Iterator[None]:
    """Pools do their jobs in this process: a new one takes six seconds to import what it needs."""

    def submit(pool: SpawnPool, function: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **options))
        except Exception as error:
            future.set_exception(error)
        return future

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpawnPool, "submit", submit)
        yield


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory, foundation: str) -> Path:
    """Where the embedded world's shards lie, rendered and encoded once for all tests."""
    from univigu.data.datamodule import VideoTextDataModule

    root = tmp_path_factory.mktemp("shapes")
    VideoTextDataModule(foundation, str(root), **SMALL).prepare_data()
    return root


@pytest.fixture(scope="session")
def small_data(shapes_root: Path, foundation: str) -> list[str]:
    """Arguments that make any configuration run on a handful of clips."""
    sizes = [f"--data.{name}={value}" for name, value in SMALL.items()]
    return [f"--model.foundation={foundation}", f"--data.root={shapes_root}", *sizes]


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with the shipped configurations in reach as ``configs``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    return tmp_path


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run the command line on a user's mistake; gives what it printed, after checking that it exits with 2."""
    from univigu.cli import main

    def run(args: list[str]) -> str:
        with pytest.raises(SystemExit) as error:
            main(args)
        assert error.value.code == 2
        printed = capsys.readouterr().err
        assert "Traceback" not in printed and "usage:" not in printed
        assert sum(line.startswith("error: ") for line in printed.splitlines()) == 1
        return printed

    return run


def parse_command(args: list[str]) -> None:
    """Parse the arguments of ``lightning`` and instantiate nothing."""
    if args[0] == "demo":
        from univigu.demo import parse

        parse(args[1:])
        return
    from lightning.pytorch.cli import LightningCLI

    from univigu.training.lightning_cli import UniViGUCLI

    class Parsed(Exception):
        pass

    class OnlyParse(UniViGUCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {args[0]: LightningCLI.subcommands()[args[0]]}  # each of the others takes as long

        def instantiate_classes(self) -> None:
            raise Parsed

    with pytest.raises(Parsed):
        OnlyParse(args)


def run_ranks(function: Callable[..., object], *args: Any, processes: int = 2, join: bool = True) -> Any:
    """Call a function in several processes that know each other by torch.distributed, on the CPU, as torchrun would.

    They are forks, which import nothing anew, unless this process has used a GPU.  Without ``join`` it gives torch's
    context of the running processes, of which none is ended where another fails.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    method = "spawn" if torch.cuda.is_initialized() else "fork"
    return start_processes(_as_rank, (processes, port, function, args), processes, join, start_method=method)


def _as_rank(rank: int, processes: int, port: int, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(zip(names, map(str, (rank, rank, processes, processes)), strict=True))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(300, exit=True)  # where ranks wait for each other for ever
    try:
        function(*args)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def in_fork(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a process of its own: a fork of one that has imported modules and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["univigu.training.module"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def added_memory(warm_up: Callable[[], object], work: Callable[[], object]) -> int:
    """Bytes of resident memory that work adds at its peak to what is there before it; for a process of its own."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 16384)  # M_MMAP_THRESHOLD: freed memory goes back at once
    warm_up()
    gc.collect()
    libc.malloc_trim(0)  # also what the forked process had freed
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    work()
    return 1024 * (_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
