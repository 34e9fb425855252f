"""The GPU report's rows at a size for a CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from tools import gpu_report


def test_all_rows_are_measured_and_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    content = gpu_report.main(
        ["--size", "tiny", "--device", "cpu", "--output", str(path), "--folder", str(tmp_path / "clips")]
    )
    assert json.loads(path.read_text()) == content
    rows, fp8 = content["rows"], importlib.util.find_spec("torchao") is not None
    failed = [row["name"] for row in rows if "error" in row and (fp8 or "FP8" not in row["name"])]
    assert not failed and len(rows) == 23
    assert all(row["seconds"] > 0 for row in rows if "seconds" in row)


def test_a_run_out_of_time_says_so_in_every_row(tmp_path: Path) -> None:
    report = gpu_report.Report(tmp_path / "report.json", gpu_report.torch.device("cpu"), "tiny", -1.0)
    report.row("late", lambda: {"seconds": 1.0})
    assert json.loads(report.path.read_text())["rows"][0]["error"].startswith("TimeoutError: not measured")
