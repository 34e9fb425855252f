"""What several programs that write one folder go by: their numbers, a lock, and files that nobody replaces."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from univigu.data.build import RANKS, SLURM_RANKS, Share, alone, build_folder, claim, this_device
from univigu.data.shards import Manifest, ShardInfo, write_shard
from univigu.evaluation.ledger import Ledger


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Share()),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Share(1, 4)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, Share(2, 4)),  # srun
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, Share(1, 2)),  # torchrun
        ({"SLURM_NTASKS": "4"}, Share()),  # the shell of salloc
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Share()),  # a script of sbatch, which runs once
        ({"SLURM_STEP_NUM_TASKS": "4"}, Share()),
        ({"WORLD_SIZE": "2", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, Share(0, 2)),
    ],
)
def test_processes_know_their_numbers(
    variables: dict[str, str], expected: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*RANKS, *SLURM_RANKS, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Share.from_environment() == expected
    assert Share.from_environment(5, 7) == Share(5, 7)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_processes_of_a_node_take_one_gpu_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert this_device() == "cuda:0"
    monkeypatch.setenv(name, "6")
    assert this_device() == "cuda:2"


@pytest.fixture(params=["links", "no links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with hard links, and one that refuses them as exFAT and some network file systems do."""

    def refused(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refused)


def test_a_claimed_name_is_not_replaced(tmp_path: Path, file_system: None) -> None:
    for number in range(2):
        (tmp_path / f"{number}").write_text(f"from {number}")
        claim(tmp_path / f"{number}", tmp_path / "claimed")
    assert (tmp_path / "claimed").read_text() == "from 0" and (tmp_path / "0").exists()
    with pytest.raises(FileNotFoundError):
        claim(tmp_path / "gone", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _write(path: Path, job: int) -> ShardInfo:
    return write_shard(path, [(str(job), {"json": b"{}"})])


def test_folders_and_ledgers_are_written_anywhere(tmp_path: Path, file_system: None) -> None:
    jobs = {f"{i}.tar": i for i in range(3)}
    for rank in (1, 0):
        made = build_folder(tmp_path / "a", Manifest("video", {}), jobs, _write, None, "", Share(rank, 2))
        announced = Manifest.load(tmp_path / "a")
        assert announced is not None and announced.complete == made.complete == (rank == 0)
    for share in (Share(0, 2), Share(1, 2)):
        ledger = Ledger(tmp_path / "b", {"a": 1}, share)
        ledger.add("xy"[share.rank])
    assert ledger.results(["x", "y"]) is not None


def test_a_second_program_waits_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "univigu.data.build")
    order: list[str] = []

    def second() -> None:
        with alone(tmp_path / "new", Share()):
            order.append("second")

    with alone(tmp_path / "new", Share()), alone(tmp_path / "new", Share(1, 2)):  # another share does not wait
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.5)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert any("another program is writing it; waiting" in message for message in caplog.messages)
