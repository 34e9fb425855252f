"""Checkpoints that are cut off while they are written, on another file system or a full disk, and hostile ones."""

from __future__ import annotations

import http.server
import os
import pickle
import resource
import signal
import threading
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from univigu.models.weights import CheckpointError
from univigu.training.checkpoint_io import SafeCheckpointIO
from univigu.training.parallel import ShardedStrategy

OLD = {"weight": torch.arange(1000)}


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
    """It may be on another file system, or full."""
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr("tempfile.tempdir", None)
    SafeCheckpointIO().save_checkpoint({"weight": torch.ones(3)}, path)
    assert SafeCheckpointIO().load_checkpoint(path)["weight"].tolist() == [1, 1, 1]


def test_a_full_disk_leaves_the_old_one(path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a longer file is an OSError
    try:
        with pytest.raises(OSError, match=r"last\.ckpt: the checkpoint could not be written \(.*earlier one is unch"):
            SafeCheckpointIO().save_checkpoint({"weight": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_old(path)


def save_and_die(path: Path, at: str) -> None:
    """Save another checkpoint in a process that is killed when it calls a function of os."""
    torch.set_num_threads(1)
    setattr(os, at, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    SafeCheckpointIO().save_checkpoint({"weight": torch.zeros(1000)}, path)  # no threads, which do not survive a fork


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_kill_leaves_the_old_one(path: Path, at: str) -> None:
    process = get_context("fork").Process(target=save_and_die, args=(path, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
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
