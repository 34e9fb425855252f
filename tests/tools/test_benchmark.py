"""The measurements run, and report what they say they report."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

# A module by name, and not run by its path: what it hands to other processes they must find again.
tool: Any = importlib.import_module("tools.benchmark")


@pytest.mark.slow
def test_reading_is_measured_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["data", "--size=64x64x9", "--clips=4", "--batch-size=2", "--repeats=1", f"--folder={tmp_path}"]
    found = tool.main(args)
    printed = capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"videos", "latents"}
    rows = dict(re.findall(r"│ (bare decord|loader, \w+) +│ ([\d.]+) ", printed))
    times = {name: float(value) for name, value in rows.items()}
    assert set(times) == {"bare decord", "loader, videos", "loader, latents"} and min(times.values()) > 0
    (share,) = re.findall(r"on videos the loader gives (\d+)% of bare decord's clips", printed)
    assert abs(int(share) - 100 * times["bare decord"] / times["loader, videos"]) <= 1
    assert abs(int(share) - 100 * found["video_ratio"]) <= 1
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    tool.main(args)  # the clips are there
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}


def test_batches_must_be_whole(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--clips 5: expected a multiple"):
        tool.main(["data", "--clips=5", "--batch-size=2", f"--folder={tmp_path}"])
    assert not any(tmp_path.iterdir())


def test_a_step_of_both_is_measured_beside_one_of_the_video() -> None:
    size = "--frames 1 --latents 8 8 --width 32 --heads 2 --ffn-dim 64 --layers 2 --text-tokens 4 --vocab-size 50"
    for checkpointing in ([], ["--checkpointing"]):
        found = tool.main(["step", *size.split(), "--repeats", "1", *checkpointing])
        assert found["ratio"] > 0 and 1 < found["bound"] < 2
