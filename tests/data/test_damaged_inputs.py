"""Damaged inputs among sound ones: each is counted, none comes through, and every sound sample arrives.

UNIVIGU_DAMAGED=1000 (a multiple of 4) takes as many damaged inputs.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from tests.damage import (
    DAMAGES,
    SHARD_DAMAGES,
    good_sample,
    kind_of,
    mutate,
    videos_to_mutate,
    write_damaged,
    write_raw,
)
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.sample import SampleReason
from univigu.data.video import VideoError, read_video
from univigu.training.lightning_cli import UniViGUCLI
from univigu.training.module import UniViGU


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, set[str]]:
    """A folder, the number of its damaged inputs the keys of its sound samples."""
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


@pytest.fixture(scope="module")
def mutated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str | None]]:
    """A folder of mutated videos, as files and in shards, and for each file its error, None if it can be read."""
    folder, rng, verdicts, samples = tmp_path_factory.mktemp("mutated"), random.Random(1), {}, []
    originals, text = videos_to_mutate(), good_sample(3)["json"]
    (folder / "files").mkdir()
    for number in range(int(os.environ.get("UNIVIGU_DAMAGED", 28))):
        path = folder / "files" / f"{number:05d}.mp4"
        path.write_bytes(mutate(rng, originals[number % len(originals)]))
        samples.append((path.stem, {"mp4": path.read_bytes(), "json": text}))
        try:
            read_video(path, 9, 64, 64)
            verdicts[str(path)] = None
        except VideoError as error:
            verdicts[str(path)] = str(error)
    for start in range(0, len(samples), 50):
        write_raw(folder / "shards" / "train" / f"{start:05d}.tar", samples[start : start + 50])
    assert None in verdicts.values() and len(set(verdicts.values())) > 1
    return folder, verdicts


@pytest.mark.slow
def test_a_fit_counts_each_mutated_video(
    mutated: tuple[Path, dict[str, str | None]], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, verdicts = mutated
    broken = {Path(path).stem for path, error in verdicts.items() if error is not None}
    seen = set[str]()
    training_step = UniViGU.training_step
    monkeypatch.setattr(UniViGU, "training_step", lambda *args: seen.update(args[1]["key"]) or training_step(*args))
    arguments = ["--config=configs/recall.yaml", f"--data.shards={folder / 'shards'}", "--data.precompute=false"]
    arguments += [f"--stages.recall.steps={len(verdicts) // 4}", "--data.batch_size=4", "--data.num_workers=1"]
    cli = UniViGUCLI(["fit", *arguments, "--trainer.limit_val_batches=0", "--trainer.logger=false"])
    assert seen == {Path(path).stem for path in verdicts} - broken
    assert {key for _, key, _ in cli.datamodule.errors.seen} == broken
    assert cli.datamodule.errors.counts == {"unreadable_video": len(broken)}


@pytest.mark.slow
def test_a_prediction_has_a_row_for_each_mutated_video(
    mutated: tuple[Path, dict[str, str | None]], in_tmp: Path
) -> None:
    folder, verdicts = mutated
    arguments = ["--config=configs/caption.yaml", f"--data.videos={folder / 'files'}", "--data.num_workers=1"]
    UniViGUCLI(["predict", *arguments, "--model.sampling.caption_steps=2"])
    rows = [json.loads(line) for line in Path("runs/caption/captions.jsonl").read_text().splitlines()]
    assert {row["video"]: row["error"] for row in rows} == verdicts and len(rows) == len(verdicts)
    assert all((row["caption"] is None) == (row["error"] is not None) for row in rows)
