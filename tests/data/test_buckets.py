"""Clips of several sizes in batches of one size each, from videos and from latents."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from tests.data.conftest import ranked
from tools.encode import main as encode_command
from univigu.data.buckets import Bucket, best_bucket, choose_bucket
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.index import index_folder
from univigu.data.sample import DataError, SampleError
from univigu.data.shards import Manifest, write_shard
from univigu.data.sources import encode_shards
from univigu.data.video import encode_mp4, read_video
from univigu.models.foundation import EMBEDDED_FOUNDATION
from univigu.shapes import renderer, scenes, texts

WIDE, TALL, LONG = Bucket(32, 64, 5), Bucket(64, 32, 5), Bucket(32, 64, 13)
SIZES = {WIDE: (34, 66, 6), TALL: (80, 40, 5), LONG: (32, 64, 14)}
"""Sizes of clips that belong to each bucket, none of them quite its own."""
COUNTS = {WIDE: 9, TALL: 7, LONG: 5}


def members(seed: int, height: int, width: int, num_frames: int) -> dict[str, bytes]:
    scene = scenes.sample_scene(seed)
    description = {"prompt": texts.prompt_of(scene), "caption": texts.caption_of(scene)}
    video = encode_mp4(renderer.render(scene, height, width, num_frames))
    return {"mp4": video, "json": json.dumps(description).encode()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of three sizes, in turn, in three shards a split."""
    folder = tmp_path_factory.mktemp("mixed")
    kinds = [bucket for i in range(9) for bucket in SIZES if i < COUNTS[bucket]]
    samples = [(f"{bucket!s}-{i:03d}", members(i, *SIZES[bucket])) for i, bucket in enumerate(kinds)]
    for split in ("train", "val"):
        (folder / split).mkdir()
        for number in range(3):
            write_shard(folder / split / f"{number}.tar", samples[number::3])
    return folder


@pytest.fixture(scope="module")
def encoded(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoded")
    for split in ("train", "val"):
        encode_shards(mixed / split, folder / split, EMBEDDED_FOUNDATION, buckets=tuple(SIZES))
    return folder


def data(shards: Path, **changes: Any) -> VideoTextDataModule:
    options: dict[str, Any] = {"batch_size": 2, "num_workers": 0, "prompt_length": 64, "precompute": False}
    module = VideoTextDataModule(shards=str(shards), **{"buckets": list(SIZES), **options, **changes})
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ((480, 832, 81), 0),
        ((1080, 1920, 300), 0),
        ((832, 480, 81), 1),
        ((1920, 1080, 24), 1),
        ((500, 500, 81), 2),
        ((240, 416, 81), 3),
        ((480, 832, 30), 4),
        ((480, 832, 50), 4),
        ((480, 832, 1), 4),
    ],
)
def test_a_clip_goes_where_most_of_it_is_kept(clip: tuple[int, int, int], expected: int) -> None:
    buckets = [
        Bucket(480, 832, 81),
        Bucket(832, 480, 81),
        Bucket(624, 624, 81),
        Bucket(240, 416, 81),
        Bucket(480, 832, 33),
    ]
    assert best_bucket(buckets, *clip) == expected


def check_epoch(loaders: list[Any], stored: bool) -> set[str]:
    """One epoch of all ranks: sound, whole, nothing twice; returns its keys."""
    keys: list[str] = []
    for batches in zip(*loaders, strict=True):
        assert len({batch["bucket"][0] for batch in batches}) == 1
        for batch in batches:
            (number,) = set(batch["bucket"])
            bucket = list(SIZES)[number]
            assert all(key.startswith(str(bucket)) for key in batch["key"])
            if stored:
                expected: tuple[int, ...] = ((bucket.num_frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8)
                assert batch["latents"].shape[2:] == expected
            else:
                expected = (bucket.num_frames, 3, bucket.height, bucket.width)
                assert batch["video"].shape[1:] == expected
            keys += batch["key"]
    assert len(keys) == len(set(keys))
    return set(keys)


@pytest.mark.parametrize("stored", [False, True], ids=["videos", "latents"])
def test_two_ranks_with_two_workers_share_an_epoch(mixed: Path, encoded: Path, stored: bool) -> None:
    module = data(encoded if stored else mixed, num_workers=2 if stored else 0)
    counts = Counter(ref.bucket for ref in module._refs["train"])
    assert counts == {number: COUNTS[bucket] for number, bucket in enumerate(SIZES)}
    loaders = ranked(module, 2)
    first = check_epoch(loaders, stored)
    assert len(first) == 4 * sum(count // 4 for count in COUNTS.values()) == 16
    second = check_epoch(loaders, stored)
    assert len(second) == 16 and first != second


@pytest.mark.slow
def test_resuming_in_mid_epoch_goes_on_exactly(mixed: Path, encoded: Path) -> None:
    for folder in (mixed, encoded):
        straight = data(folder).train_dataloader()
        expected = [batch for _ in range(2) for batch in straight]
        stops = ((1, 0), (len(straight), 2), (len(straight) + 3, 1)) if folder == encoded else ((4, 0),)
        for stop, workers in stops:
            interrupted = data(folder).train_dataloader()
            batches = (batch for _ in range(2) for batch in interrupted)
            for _ in range(stop):
                next(batches)
            resumed = data(folder, num_workers=workers).train_dataloader()
            resumed.load_state_dict(interrupted.state_dict())
            for batch, other in zip(expected[stop : stop + 4], resumed, strict=False):
                assert batch["key"] == other["key"]
                name = "latents" if "latents" in batch else "video"
                assert torch.equal(batch[name], other[name])


def test_resuming_with_other_ranks_or_buckets(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = data(mixed, batch_size=4)
    one = module.train_dataloader()
    iterator = iter(one)
    next(iterator)
    state, expected = one.state_dict(), sorted(next(iterator)["key"])
    module.batch_size = 2
    loaders = ranked(module, 2)
    for loader in loaders:
        loader.load_state_dict(state)
    assert sorted(key for loader in loaders for key in next(iter(loader))["key"]) == expected and not caplog.messages
    data(mixed, batch_size=2).train_dataloader().load_state_dict(state)
    assert "another global batch and buckets" in caplog.text
    with pytest.raises(DataError, match=r"refers to dataset=.* with the same shards, weights, buckets"):
        data(mixed, buckets=[TALL, WIDE, LONG]).train_dataloader().load_state_dict(state)


def test_evaluation_sees_every_clip_once(mixed: Path, encoded: Path) -> None:
    for folder in (mixed, encoded):
        keys = [key for batch in data(folder).val_dataloader() for key in batch["key"]]
        assert len(keys) == len(set(keys)) == sum(COUNTS.values())


def test_latents_are_those_of_each_clips_bucket(mixed: Path, encoded: Path, foundation: str) -> None:
    from univigu.data.video import to_model_range
    from univigu.models.encode import encode_clips
    from univigu.models.foundation import Foundation

    vae = Foundation(foundation).vae
    videos = {ref.key: ref for ref in index_folder(mixed / "train")[0]}
    for batch in data(encoded, batch_size=1).val_dataloader():
        bucket = list(SIZES)[batch["bucket"][0]]
        raw = videos[batch["key"][0]].read("mp4")
        with torch.inference_mode():
            frames = read_video(raw, bucket.num_frames, bucket.height, bucket.width)
            assert torch.equal(encode_clips(vae, to_model_range(frames[None])), batch["latents"])
    manifest = Manifest.load(encoded / "train")
    assert manifest is not None and manifest.parameters["buckets"] == [str(bucket) for bucket in SIZES]
    with pytest.raises(DataError, match=r"encoded with buckets=\['32x64x5', .*this run has buckets=\['64x32x5'"):
        data(encoded, buckets=[TALL, WIDE, LONG])


@pytest.mark.slow
def test_precomputing_makes_the_same_latents(mixed: Path, encoded: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed, tmp_path, dirs_exist_ok=True)
    shutil.copytree(mixed / "val", tmp_path / "test")
    made = data(tmp_path, precompute=True)
    assert list(tmp_path.glob("latents-*-3buckets-*/train/0.tar"))
    for ours, theirs in zip(made.val_dataloader(), data(encoded).val_dataloader(), strict=True):
        assert ours["key"] == theirs["key"] and torch.equal(ours["latents"], theirs["latents"])


def test_damaged_clips_are_counted_and_replaced_within_their_bucket(tmp_path: Path) -> None:
    good = {f"{bucket}-{i}": members(i, *SIZES[bucket]) for bucket in SIZES for i in range(4)}
    header = members(9, *SIZES[TALL])
    video = header["mp4"]
    with av.open(io.BytesIO(video)) as container:
        start, *_, end = (packet.pos + packet.size for packet in container.demux(video=0) if packet.size)
    broken = {**header, "mp4": video[:start] + bytes(end - start) + video[end:]}  # no frame but the first
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        bad = {"bad-text": {**header, "mp4": b"no video" * 90}, "bad-frames": broken}
        write_shard(tmp_path / split / "a.tar", [*good.items(), *bad.items()])
    module = data(tmp_path)
    assert module.filter_counts["train"] == {"kept": 13, "unreadable_video": 1}  # no first frame
    loader = module.train_dataloader()
    for _ in range(3):
        for batch in loader:
            assert len(batch["key"]) == 2 and len({key.rpartition("-")[0] for key in batch["key"]}) == 1
            assert not any(key.startswith("bad") for key in batch["key"])
    assert module.errors.counts == {"unreadable_video": 3}  # no first frame in train and val, no others in train


def test_overfitting_takes_whole_batches(mixed: Path) -> None:
    from types import SimpleNamespace

    module = data(mixed)
    module.trainer = SimpleNamespace(overfit_batches=3, world_size=1)  # type: ignore[assignment]
    loader = module.train_dataloader()
    passes = [sorted(key for batch in loader for key in batch["key"]) for _ in range(2)]
    assert len(loader) == 3 and passes[0] == passes[1] and len(set(passes[0])) == 6


def test_latents_of_no_bucket_are_counted(encoded: Path) -> None:
    choose = partial(choose_bucket, buckets=[WIDE, TALL], shapes=[(2, 4, 8), (2, 8, 4)])
    refs = index_folder(encoded / "train")[0]
    for ref in refs:
        if ref.key.startswith(str(LONG)):
            with pytest.raises(SampleError, match=r"wrong_shape in 'latents': \[T, H, W\] is \[4, 4, 8\]"):
                choose(ref)
        else:
            assert choose(ref) == (0 if ref.key.startswith(str(WIDE)) else 1)
    damaged = refs[0]
    path, offset, _ = damaged.members["latents.safetensors"]
    for size in (0, 5, 12):
        damaged.members["latents.safetensors"] = (path, offset, size)
        with pytest.raises(SampleError, match="corrupt_latents"):
            choose(damaged)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([Bucket(64, 60, 9)], r"data\.buckets\[0\]\.width=60: expected a multiple of 16"),
        ([Bucket(64, 64, 9), Bucket(40, 64, 9)], r"data\.buckets\[1\]\.height=40: expected a multiple of 16"),
        ([Bucket(64, 64, 9), Bucket(32, 64, 6)], r"data\.buckets\[1\]\.num_frames=6: expected 4k\+1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(mixed: Path, buckets: list[Bucket], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data(mixed, buckets=buckets)


def test_unusable_buckets_are_named(capsys: pytest.CaptureFixture[str], mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.buckets: height=0: expected at least 2"):
        Bucket(0, 64, 9)
    with pytest.raises(ValueError, match=r"data\.buckets=\[.*\]: 32x64x5 is there twice"):
        VideoTextDataModule(buckets=[WIDE, TALL, WIDE])
    args = ["--source", str(mixed), "--output", str(tmp_path / "made"), "--buckets"]
    for text in ("480x832", "axbxc", "64x64x9.5"):
        assert encode_command([*args, text]) == 2
        assert f"bucket {text!r}: expected HEIGHTxWIDTHxFRAMES" in capsys.readouterr().err
