"""Several processes that write one folder: their ranks, locks, and results that survive a kill."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from univigu.data.parts import Record, build_folder, locked, run_jobs
from univigu.data.processes import ONLY, SRUN, TORCHRUN, Share, this_device
from univigu.data.sample import DataError
from univigu.data.shards import Manifest, ShardInfo, write_shard


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
    for name in (*TORCHRUN, *SRUN, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Share.from_environment() == expected
    assert Share.from_environment(5, 7) == Share(5, 7)
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="RANK='x': expected a number"):
        Share.from_environment()


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_processes_of_a_node_take_one_gpu_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert this_device() == "cuda:0"
    monkeypatch.setenv(name, "6")
    assert this_device() == "cuda:2"


def _write(path: Path, job: int) -> ShardInfo:
    if job < 0:
        raise RuntimeError("killed")
    return write_shard(path, [(str(job), {"json": b"{}"})])


def build(folder: Path, jobs: dict[str, int], share: Share = ONLY, **parameters: Any) -> Manifest:
    return build_folder(folder, Manifest("video", parameters), jobs, _write, None, "", share)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_shards_do_not_depend_on_processes_and_interruptions(tmp_path: Path) -> None:
    jobs = {f"{i}.tar": i for i in range(5)}
    assert build(tmp_path / "one", jobs).complete
    for rank in (1, 0):
        made = build(tmp_path / "two", jobs, Share(rank, 2))
        saved = Manifest.load(tmp_path / "two")
        assert saved is not None and saved.complete == made.complete == (rank == 0)
    with pytest.raises(RuntimeError, match="killed"):
        build(tmp_path / "killed", {**jobs, "3.tar": -1})
    saved = Manifest.load(tmp_path / "killed")
    assert saved is not None and not saved.complete
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.tar")}
    assert len(before) == 3
    complete = [build(tmp_path / "killed", jobs, Share(rank, 3)).complete for rank in range(3)]  # another number
    assert complete == [False, True, True]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "killed")


@pytest.mark.parametrize("records", [True, False])
def test_damaged_shards_are_written_again(tmp_path: Path, records: bool) -> None:
    jobs = {f"{i}.tar": i for i in range(3)}
    build(tmp_path, jobs)
    expected = contents(tmp_path)
    if not records:  # a copy of the visible files
        shutil.rmtree(tmp_path / ".parts")
    (tmp_path / "1.tar").write_bytes(expected["1.tar"][:1000])
    (tmp_path / "2.tar").unlink()
    for name in ("2.tar", "manifest.json"):
        (tmp_path / f".{name}.12345.tmp").write_bytes(b"of a killed process")
    before = (tmp_path / "0.tar").stat().st_mtime_ns
    assert not build(tmp_path, jobs, Share(0, 2)).complete  # 1.tar is the other process's
    assert build(tmp_path, jobs, Share(1, 2)).complete
    assert contents(tmp_path) == expected
    assert not records or (tmp_path / "0.tar").stat().st_mtime_ns == before


def test_shards_of_something_else_are_refused(tmp_path: Path) -> None:
    build(tmp_path / "a", {"0.tar": 0}, seed=1)
    with pytest.raises(DataError, match="was made with seed=1, this run has seed=2"):
        build(tmp_path / "a", {"0.tar": 0}, seed=2)
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(DataError, match="was made with seed=1, this run has seed=2"):
        build(tmp_path / "a", {"0.tar": 0}, seed=2)
    (tmp_path / "a" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "a" / ".parts")
    with pytest.raises(DataError, match=r"holds shards of unknown origin \(0\.tar"):
        build(tmp_path / "a", {"0.tar": 0}, seed=1)


def test_a_second_process_waits_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path / "new", "0"):
            order.append("second")

    with locked(tmp_path / "new", "0"), locked(tmp_path / "new", "1"):  # another share does not wait
        thread = threading.Thread(target=second)
        thread.start()
        while "waiting for another process" not in caplog.text and thread.is_alive():
            thread.join(0.01)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_jobs_are_done_once_and_failed_ones_again(tmp_path: Path) -> None:
    texts = ["a", "b\u2028\x85\r\n \udc80", "c", "d"]  # all kinds of line ends, and a byte that is no text
    broken, killed = {1, 2}, False
    calls: list[int] = []

    def make(numbers: Sequence[int]) -> Iterator[tuple[int, Record, dict[str, bytes]]]:
        for number in numbers:
            calls.append(number)
            if number == 3 and killed:
                raise RuntimeError("killed")
            error = "broken" if number in broken else None
            yield number, {"text": texts[number], "error": error}, {f"files/{number}": b"x"}

    def run(share: Share = ONLY, **parameters: Any) -> list[Record] | None:
        return run_jobs(tmp_path, parameters, 4, make, lambda rows: {"all.txt": str(len(rows))}, 2, share)

    assert run(Share(0, 2)) is None and calls == [0, 2]
    killed = True
    with pytest.raises(RuntimeError, match="killed"):
        run(Share(1, 2))
    assert not (tmp_path / "all.txt").exists()
    calls.clear()
    killed = False
    broken.remove(2)
    rows = run()
    assert calls == [1, 2, 3]
    assert rows is not None and [row["text"] for row in rows] == texts and rows[1]["error"] == "broken"
    assert (tmp_path / "all.txt").read_text() == "4"
    with pytest.raises(DataError, match="was made with a=None, this run has a=2"):
        run(a=2)
