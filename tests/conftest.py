"""Shared fixtures: the shipped foundation, and small runs of the real command line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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

from univigu.data.processes import SpawnPool

REPO = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left alone with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


@pytest.fixture(scope="session")
def foundation() -> str:
    """Path of a foundation folder in WanPipeline layout; UNIVIGU_FOUNDATION names another than the shipped one."""
    from univigu.models.foundation import EMBEDDED_FOUNDATION  # heavy, and many tests need none

    return os.environ.get("UNIVIGU_FOUNDATION", EMBEDDED_FOUNDATION)


@pytest.fixture(scope="session")
def pool() -> Iterator[SpawnPool]:
    """A process that renders and encodes; starting one takes seconds."""
    with SpawnPool(1) as processes:
        yield processes


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the embedded world's shards lie, rendered and encoded once for all tests."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def small_data(shapes_root: Path, foundation: str) -> list[str]:
    """Arguments that make any configuration run on a handful of clips."""
    return [
        f"--model.foundation={foundation}",
        f"--data.root={shapes_root}",
        "--data.num_train_clips=8",
        "--data.num_val_clips=4",
        "--data.batch_size=4",
        "--data.num_workers=0",
    ]


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
        assert "Traceback" not in printed
        return printed

    return run


def run_processes(script: Path, args: list[str], processes: int = 2) -> None:
    """Run a file as a script in several processes that know each other by torch.distributed, on the CPU."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    result = subprocess.run(
        [sys.executable, *launcher, str(script), *args], capture_output=True, text=True, check=False, cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
