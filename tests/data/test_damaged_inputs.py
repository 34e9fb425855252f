"""Damaged inputs among sound ones: each is counted, none comes through, and every sound sample arrives."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from tests.damage import DAMAGES, SHARD_DAMAGES, kind_of, write_damaged
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.sample import SampleError, SampleReason


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, set[str]]:
    """A folder, the number of its damaged inputs (UNIVIGU_DAMAGED sets it), the keys of its sound samples."""
    folder = tmp_path_factory.mktemp("damaged")
    number = int(os.environ.get("UNIVIGU_DAMAGED", 2 * len(DAMAGES) + len(SHARD_DAMAGES)))
    return folder, number, write_damaged(folder / "val", number, 20)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_inputs_are_counted_and_sound_ones_arrive(damaged: tuple[Path, int, set[str]], workers: int) -> None:
    folder, number, sound = damaged
    data = VideoTextDataModule(shards=str(folder), batch_size=8, num_workers=workers, precompute=False)
    data.setup("validate")
    arrived: Counter[str] = Counter()
    for batch in data.val_dataloader():
        assert all(len(batch[name]) == len(batch["key"]) for name in ("video", "prompt_ids", "caption_ids"))
        arrived.update(batch["key"])
    assert arrived == dict.fromkeys(sound, 1)
    assert len(data.errors.seen) == number
    assert {kind_of(shard, key) for shard, key, _ in data.errors.seen} == {*DAMAGES, *SHARD_DAMAGES}
    assert {reason for *_, reason in data.errors.seen} <= set(get_args(SampleReason))


def test_strict_mode_raises_with_shard_and_key(tmp_path: Path) -> None:
    write_damaged(tmp_path / "val", 10, 4)
    for name in SHARD_DAMAGES:
        (tmp_path / "val" / f"{name}.tar").unlink()
    data = VideoTextDataModule(shards=str(tmp_path), num_workers=0, precompute=False, strict=True)
    with pytest.raises(SampleError, match=r"00000\.tar: sample '[a-z-]+-0000\d': \w+"):
        data.setup("validate")
        list(data.val_dataloader())
