"""Damaged inputs among sound ones: each is counted, none comes through, and every sound sample arrives."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from tests.damage import DAMAGES, SHARD_DAMAGES, kind_of, write_damaged
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.sample import SampleReason


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, set[str]]:
    """A folder, the number of its damaged inputs (UNIVIGU_DAMAGED sets it), the keys of its sound samples."""
    folder = tmp_path_factory.mktemp("damaged")
    number = int(os.environ.get("UNIVIGU_DAMAGED", 2 * len(DAMAGES) + len(SHARD_DAMAGES)))
    return folder, number, write_damaged(folder / "val", number, 20)


def test_damaged_inputs_are_counted_and_sound_ones_arrive(damaged: tuple[Path, int, set[str]]) -> None:
    folder, number, sound = damaged
    # large batches: one without a sound sample would take a sound one a second time
    data = VideoTextDataModule(shards=str(folder), batch_size=max(8, number // 4), num_workers=1, precompute=False)
    data.setup("validate")
    arrived: Counter[str] = Counter()
    for batch in data.val_dataloader():
        assert all(len(batch[name]) == len(batch["key"]) for name in ("video", "prompt_ids", "caption_ids"))
        arrived.update(batch["key"])
    assert arrived == dict.fromkeys(sound, 1)
    assert len(data.errors.seen) == number
    assert {kind_of(shard, key) for shard, key, _ in data.errors.seen} == {*DAMAGES, *SHARD_DAMAGES}
    assert {reason for *_, reason in data.errors.seen} <= set(get_args(SampleReason))
