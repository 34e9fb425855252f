"""The measurements run, and report what they say they report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import benchmark as tool


@pytest.mark.slow
def test_reading_is_measured_side_by_side(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tool.main(["data", "--size=64x64x9", "--clips=4", "--batch-size=2", "--repeats=1"])
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^(decord|loader, \w+): ([\d.]+) s$", printed, re.M))
    times = {name: float(value) for name, value in rows.items()}
    assert set(times) == {"decord", "loader, videos", "loader, latents"} and min(times.values()) > 0
    ratio = found["speed on videos, against decord"]
    assert ratio == pytest.approx(times["decord"] / times["loader, videos"], rel=0.01)
    assert f"speed on videos, against decord: {ratio:.4g}\n" in printed


def test_batches_must_be_whole(in_tmp: Path) -> None:
    with pytest.raises(SystemExit, match="--clips 5: expected a multiple"):
        tool.main(["data", "--clips=5", "--batch-size=2"])
    assert not Path("runs").exists()


SIZE = "--text-tokens 4 --frames 1 --steps 2 --repeats 1"


@pytest.mark.slow
def test_captions_are_the_same_with_and_without_the_cache() -> None:
    found = tool.main(["caption", *SIZE.split()])
    assert found["share of same tokens"] == 1 and found["at most, by operations"] > 1


@pytest.mark.slow
def test_answers_are_the_same_together_and_one_by_one() -> None:
    found = tool.main(["questions", *SIZE.split()])
    assert found["share of same tokens"] == 1 and found["cost of 8 questions"] > 0
