"""The check itself, on a few dozen inputs of every kind."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.damage import DAMAGES, SHARD_DAMAGES
from univigu.data.sample import SAMPLE_REASONS, SampleError

tool = runpy.run_path(str(REPO / "tools" / "check_robustness.py"))


def test_damaged_inputs_are_counted_and_good_ones_arrive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = 3 * len(DAMAGES) + len(SHARD_DAMAGES)
    assert tool["main"](["--damaged", str(damaged), "--good", "20", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"counted {damaged} of {damaged} damaged inputs; 0 came through" in printed
    assert "20 of 20 sound samples arrived" in printed
    for kind in (*DAMAGES, *SHARD_DAMAGES):
        assert kind in printed
    arrived, reasons = tool["load"](tmp_path, workers=1)  # the same in a worker process
    assert len(arrived) == 20 and sum(counts.total() for counts in reasons.values()) == damaged
    assert {name for counts in reasons.values() for name in counts} <= set(SAMPLE_REASONS)


def test_strict_mode_raises_with_shard_and_key(tmp_path: Path) -> None:
    from univigu.data.datamodule import VideoTextDataModule

    tool["write_damaged"](tmp_path / "val", 10, 4)
    for name in SHARD_DAMAGES:
        (tmp_path / "val" / f"{name}.tar").unlink()
    data = VideoTextDataModule(shards=str(tmp_path), num_workers=0, precompute=False, strict=True)
    with pytest.raises(SampleError, match=r"00000\.tar: sample '[a-z-]+-0000\d': \w+"):
        data.setup("validate")
        list(data.val_dataloader())
