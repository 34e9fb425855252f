"""The GPU report's rows at a size for a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import gpu_report


def report(folder: Path, only: str = "") -> list[dict[str, Any]]:
    path = folder / "report.json"
    content = gpu_report.main(["--size=tiny", "--device=cpu", f"--output={path}", f"--only={only}"])
    assert json.loads(path.read_text()) == content
    return content["rows"]


def test_rows_may_be_chosen(tmp_path: Path) -> None:
    rows = report(tmp_path, "train step, paper")
    assert [row["name"] for row in rows] == [
        f"train step, paper, {task}" for task in ("joint", "understand", "generate")
    ]
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_all_rows_are_measured_and_written(tmp_path: Path) -> None:
    rows = report(tmp_path)
    assert not [row for row in rows if "error" in row] and len(rows) == 19
    assert all(row.get("seconds", row.get("tflops")) > 0 for row in rows)


def test_a_row_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gpu_report.Report, "sample")
    rows = report(tmp_path, "caption, paper, bfloat16, no cache")
    assert [str(row["error"]).partition(":")[0] for row in rows] == ["AttributeError"] * 2
