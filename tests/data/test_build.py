"""Folders of shards: what an interrupted, damaged or doubly started run leaves and becomes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from univigu.data.sample import DataError
from univigu.data.shards import Manifest, ShardInfo, build_folder, locked, write_shard


def _write(path: Path, job: int) -> ShardInfo:
    if job < 0:
        raise RuntimeError("killed")
    return write_shard(path, [(str(job), {"json": b"{}"})])


def build(folder: Path, jobs: dict[str, int], **parameters: Any) -> Manifest:
    return build_folder(folder, Manifest("video", parameters), jobs, _write)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    jobs = {f"{i}.tar": i for i in range(5)}
    assert build(tmp_path / "whole", jobs).complete
    with pytest.raises(RuntimeError, match="killed"):
        build(tmp_path / "killed", {**jobs, "3.tar": -1})
    saved = Manifest.load(tmp_path / "killed")
    assert saved is not None and not saved.complete and len(saved.shards) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.tar")}
    assert len(before) == 3
    assert build(tmp_path / "killed", jobs).complete
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_damaged_shards_are_written_again(tmp_path: Path) -> None:
    jobs = {f"{i}.tar": i for i in range(3)}
    build(tmp_path, jobs)
    expected = contents(tmp_path)
    (tmp_path / "1.tar").write_bytes(expected["1.tar"][:1000])
    (tmp_path / "2.tar").unlink()
    for name in ("2.tar", "manifest.json"):
        (tmp_path / f".{name}.12345.tmp").write_bytes(b"of a killed process")
    before = (tmp_path / "0.tar").stat().st_mtime_ns
    assert build(tmp_path, jobs).complete
    assert contents(tmp_path) == expected
    assert (tmp_path / "0.tar").stat().st_mtime_ns == before


def test_shards_of_something_else_are_refused(tmp_path: Path) -> None:
    build(tmp_path, {"0.tar": 0}, seed=1)
    with pytest.raises(DataError, match="was made with seed=1, this run has seed=2"):
        build(tmp_path, {"0.tar": 0}, seed=2)
    manifest = Manifest.load(tmp_path)
    assert manifest is not None
    manifest.shards, manifest.complete = [], False
    manifest.save(tmp_path)  # as if killed before the first shard was listed
    with pytest.raises(DataError, match="was made with seed=1, this run has seed=2"):
        build(tmp_path, {"0.tar": 0}, seed=2)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"holds shards of unknown origin \(0\.tar"):
        build(tmp_path, {"0.tar": 0}, seed=1)


def test_a_run_without_a_shard_binds_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        build(tmp_path, {"0.tar": -1}, seed=1)
    assert build(tmp_path, {"0.tar": 0}, seed=2).complete


def test_a_second_process_waits_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path / "new"):
            order.append("second")

    with locked(tmp_path / "new"):
        thread = threading.Thread(target=second)
        thread.start()
        while "waiting for another process" not in caplog.text and thread.is_alive():
            thread.join(0.01)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
