"""The check of every command with sound and broken inputs: that it passes, and that it would not pass otherwise."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_inputs.py"
check = SimpleNamespace(**runpy.run_path(str(TOOL)))


@pytest.mark.slow
def test_all_commands(capfd: pytest.CaptureFixture[str]) -> None:
    """UNIVIGU_INPUTS=100 gives as many to each."""
    code = check.main(["--inputs", os.environ.get("UNIVIGU_INPUTS", "12")])
    printed = capfd.readouterr()
    assert code == 0, printed.err
    assert "all as it should be" in printed.out
    assert all(f"│ {name} " in printed.out for name in check.COMMANDS)


def test_what_it_complains_of(tmp_path: Path) -> None:
    outcome = check.Outcome(3, 2)

    def fails(args: list[str]) -> int:
        raise KeyError(args[0])

    check.call(fails, ["escaped"], 2, outcome)
    check.call(lambda args: 0, ["accepted"], 2, outcome)
    (tmp_path / "half.mp4").write_bytes(b"half")
    (tmp_path / ".rows.part").write_text("")
    check.whole(tmp_path, outcome)
    check.judge([{"error": None}, {"error": None}], [True, False, True], outcome)
    expected = ["KeyError", "expected exit code 2, got 0", "left behind", "half.mp4", "2 rows of 3", "taken"]
    assert len(outcome.complaints) == len(expected)
    assert all(part in text for part, text in zip(expected, outcome.complaints, strict=True))
