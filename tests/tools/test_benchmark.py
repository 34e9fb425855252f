"""The measurements run, and report what they say they report."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPO


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "tools" / "benchmark.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_reading_is_measured_side_by_side(tmp_path: Path) -> None:
    args = ["data", "--size=64x64x9", "--clips=4", "--batch-size=2", "--repeats=1", f"--folder={tmp_path}"]
    result = run(*args)
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"videos", "latents"}
    rows = dict(re.findall(r"│ (bare decord|loader, \w+) +│ ([\d.]+) ", result.stdout))
    times = {name: float(value) for name, value in rows.items()}
    assert set(times) == {"bare decord", "loader, videos", "loader, latents"} and min(times.values()) > 0
    (share,) = re.findall(r"on videos the loader gives (\d+)% of bare decord's clips", result.stdout)
    assert abs(int(share) - 100 * times["bare decord"] / times["loader, videos"]) <= 1
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert run(*args).returncode == 0  # the clips are there
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}


def test_batches_must_be_whole(tmp_path: Path) -> None:
    result = run("data", "--clips=5", "--batch-size=2", f"--folder={tmp_path}")
    assert result.returncode and "--clips 5: expected a multiple" in result.stderr and not any(tmp_path.iterdir())


def test_a_step_of_both_is_measured_beside_one_of_the_video() -> None:
    tool = runpy.run_path(str(REPO / "tools" / "benchmark.py"))["main"]
    size = "--frames 1 --latents 8 8 --width 32 --heads 2 --ffn-dim 64 --layers 2 --text-tokens 4 --vocab-size 50"
    for checkpointing in ([], ["--checkpointing"]):
        found = tool(["step", *size.split(), "--repeats", "1", *checkpointing])
        assert found["ratio"] > 0 and 1 < found["bound"] < 2
