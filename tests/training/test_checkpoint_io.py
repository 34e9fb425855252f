"""Checkpoints that are cut off while they are written, on another file system or a full disk, and hostile ones."""

from __future__ import annotations

import http.server
import os
import pickle
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from univigu.checkpoint import SafeCheckpointIO
from univigu.models.weights import CheckpointError
from univigu.training.parallel import ShardedStrategy

OLD = {"weight": torch.arange(1000)}
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(params=["one file system", "two file systems"])
def temporary_folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TMPDIR on the file system of the checkpoint, or on another."""
    folder = tmp_path
    if request.param == "two file systems":
        if not SHARED_MEMORY.is_dir() or SHARED_MEMORY.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is not on another file system than the temporary folder of the tests")
        folder = SHARED_MEMORY
    with TemporaryDirectory(dir=folder) as name:
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr("tempfile.tempdir", None)
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "univigu-test", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(OLD, path)
    return path


def assert_old(path: Path) -> None:
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert torch.equal(torch.load(path, weights_only=True)["weight"], OLD["weight"])


def test_the_temporary_folder_is_not_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr("tempfile.tempdir", None)
    SafeCheckpointIO().save_checkpoint({"weight": torch.ones(3)}, path)
    assert SafeCheckpointIO().load_checkpoint(path)["weight"].tolist() == [1, 1, 1]


def test_a_file_that_cannot_grow_leaves_the_old_one(path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a longer file is an OSError
    try:
        with pytest.raises(OSError, match=r"last\.ckpt: the checkpoint could not be written \(.*earlier one is unch"):
            SafeCheckpointIO().save_checkpoint({"weight": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_old(path)


def test_a_full_disk_leaves_the_old_one(small_disk: Path) -> None:
    path, new = small_disk / "last.ckpt", {"weight": torch.zeros(1_000_000)}
    SafeCheckpointIO().save_checkpoint(OLD, path)
    with pytest.raises(OSError, match=r"last\.ckpt: the checkpoint could not be written \(.*earlier one is unchanged"):
        SafeCheckpointIO().save_checkpoint(new, path)
    assert_old(path)
    with pytest.raises(OSError, match="No space left"):
        TorchCheckpointIO().save_checkpoint(new, path)  # Lightning's copies over the old one
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)


def save_and_die(path: Path, at: str) -> None:
    """Save another checkpoint in a process that is killed while it writes, or when it calls a function of os."""
    torch.set_num_threads(1)
    if at == "write":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which kills it at that size
    else:
        setattr(os, at, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    SafeCheckpointIO().save_checkpoint({"weight": torch.zeros(1000)}, path)  # no threads, which do not survive a fork


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_kill_leaves_the_old_one(path: Path, at: str, temporary_folder: None) -> None:
    process = get_context("fork").Process(target=save_and_die, args=(path, at))
    process.start()
    process.join()
    assert process.exitcode == -(signal.SIGXFSZ if at == "write" else signal.SIGKILL)
    SafeCheckpointIO().load_checkpoint(path)
    path.with_name(".last.ckpt.tmp").unlink()
    assert_old(path)


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_is_run_from_a_file_or_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    ran = tmp_path / "ran"
    torch.save({"weight": Code(ran)}, tmp_path / "bad.ckpt")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/bad.ckpt"
        for source in (tmp_path / "bad.ckpt", url):
            for weights_only in (None, False):
                with pytest.raises(CheckpointError, match=r"bad\.ckpt: not a readable checkpoint") as error:
                    SafeCheckpointIO().load_checkpoint(source, weights_only=weights_only)
                assert "weights_only=False" not in str(error.value)
        server.shutdown()
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / ".metadata").write_bytes(pickle.dumps(Code(ran)))
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        ShardedStrategy().load_checkpoint(tmp_path / "sharded")
    assert not ran.exists()
    with pytest.raises(FileExistsError):  # the file does run a command if it is let
        ran.mkdir()
        pickle.loads(pickle.dumps(Code(ran)))
