"""The GPU report's rows at a size for a CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tools import gpu_report

TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 1, "text_dim": 32}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size of seconds, whose blocks are not compiled."""
    size = gpu_report.Size(TINY, 512, (16, 2, 8, 8), 8, 16, gpu_report.SMALL_VAE)
    monkeypatch.setitem(gpu_report.SIZES, "small", size)
    monkeypatch.setattr(gpu_report.UniViGUTransformer3DModel, "compile_repeated_blocks", lambda model: None)


def report(only: str = "") -> list[dict[str, Any]]:
    return gpu_report.main(["--size=small", "--device=cpu", f"--only={only}"])


def test_rows_may_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    rows = report("train step, paper")
    assert rows == list(map(json.loads, capsys.readouterr().out.splitlines()))[1:]
    assert [row["name"] for row in rows] == [
        f"train step, paper, {task}" for task in ("joint", "understand", "generate")
    ]
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_all_rows_are_measured() -> None:
    rows = report()
    assert not [row for row in rows if "error" in row] and len(rows) == 19
    assert all(row.get("seconds", row.get("tflops")) > 0 for row in rows)


def test_a_row_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gpu_report.Report, "sample")
    rows = report("caption, paper, bfloat16, no cache")
    assert [str(row["error"]).partition(":")[0] for row in rows] == ["AttributeError"] * 2
