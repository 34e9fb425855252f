"""Plain files and lists of paths in place of shards: the same samples, and damage that is counted."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.damage import good_sample, write_raw
from univigu.data import sources as encoding
from univigu.data.buckets import Bucket
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.index import find_split, index_folder, scan_shard
from univigu.data.options import LengthFilter
from univigu.data.sample import DataError
from univigu.data.shards import Manifest
from univigu.data.sources import encode_shards
from univigu.models.foundation import EMBEDDED_FOUNDATION
from univigu.shapes import scenes

COUNT = 5
QA = [{"question": "what is red?", "answer": "the circle, and nothing else"}]


def texts(i: int) -> dict[str, Any]:
    return {**json.loads(good_sample(i)["json"]), "qa": QA}


def write_files(folder: Path, count: int = COUNT) -> Path:
    """name.mp4 and name.json, some in a folder below."""
    for i in range(count):
        home = folder / "more.clips" if i % 2 else folder
        home.mkdir(parents=True, exist_ok=True)
        (home / f"clip {i}.mp4").write_bytes(good_sample(i)["mp4"])
        (home / f"clip {i}.json").write_text(json.dumps(texts(i)))
    (folder / "README.txt").write_text("no sample")
    (folder / ".hidden.mp4").write_bytes(b"no sample")
    return folder


def videos(folder: Path, count: int) -> list[str]:
    """Clips of a folder: named from it, one outright, one without a suffix that is known."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"clips/{i}.mp4" for i in range(count)]
    names[-1] = "clips/last"
    (folder / "clips").mkdir()
    for i, name in enumerate(names):
        (folder / name).write_bytes(good_sample(i)["mp4"])
    return [str(folder / names[0]), *names[1:]]


def write_jsonl(folder: Path, count: int = COUNT) -> Path:
    rows = [{"video": video, **texts(i), "more": 1} for i, video in enumerate(videos(folder, count))]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "val.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    return folder / "val.jsonl"


def write_csv(folder: Path, count: int = COUNT) -> Path:
    rows = [{"video": video, **texts(i)} for i, video in enumerate(videos(folder, count))]
    with (folder / "val.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["caption", "video", "prompt", "scene", "qa"])
        writer.writeheader()
        writer.writerows({**row, "scene": json.dumps(row["scene"]), "qa": json.dumps(row["qa"])} for row in rows)
    return folder / "val.csv"


WRITERS = {"files": lambda base: write_files(base / "val"), "jsonl": write_jsonl, "csv": write_csv}


def batches(base: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Every sample by its prompt, which is another for each."""
    options = {"batch_size": 1, "num_workers": 0, "precompute": False} | options
    data = VideoTextDataModule(shards=str(base), **options)
    data.prepare_data()
    data.setup("validate")
    samples = list(data.val_dataloader())
    return {sample["prompt"][0]: sample for sample in samples}


def tar(base: Path, count: int = COUNT) -> Path:
    (base / "val").mkdir(parents=True)
    samples = [(f"{i:05d}", {**good_sample(i), "json": json.dumps(texts(i)).encode()}) for i in range(count)]
    write_raw(base / "val" / "a.tar", samples)
    return base


@pytest.mark.parametrize("kind", WRITERS)
def test_the_samples_are_those_of_a_shard(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path / "mine")
    expected, found = batches(tar(tmp_path / "shards")), batches(tmp_path / "mine")
    assert len(expected) == COUNT and found.keys() == expected.keys()
    for prompt, sample in found.items():
        assert torch.equal(sample["video"], expected[prompt]["video"])
        assert torch.equal(sample["caption_ids"], expected[prompt]["caption_ids"])
        assert sample["scene"] == expected[prompt]["scene"]
    answers = batches(tmp_path / "mine", texts="qa", length_filter=LengthFilter(min_caption=0))
    assert {sample["caption"][0] for sample in answers.values()} == {QA[0]["answer"]}


def test_a_name_need_not_be_utf8(tmp_path: Path) -> None:
    for split in ("train", "val"):
        clip = tmp_path / split / os.fsdecode(b"caf\xe9.mp4")
        clip.parent.mkdir()
        clip.write_bytes(good_sample(0)["mp4"])
        clip.with_suffix(".json").write_bytes(good_sample(0)["json"])
    data = VideoTextDataModule(shards=str(tmp_path), batch_size=1, num_workers=0, precompute=False)
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["key"] == [os.fsdecode(b"caf\xe9")]


@pytest.fixture(scope="module")
def from_shard(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The samples with the latents made of a shard."""
    folder = tmp_path_factory.mktemp("encoded")
    encode_shards(tar(folder / "shards") / "val", folder / "encoded" / "val", EMBEDDED_FOUNDATION)
    return batches(folder / "encoded")


@pytest.mark.parametrize("kind", WRITERS)
def test_latents_are_those_of_a_shard(
    kind: str,
    from_shard: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "SAMPLES_PER_SHARD", 2)
    WRITERS[kind](tmp_path / "mine")
    source, target = find_split(tmp_path / "mine", "val"), tmp_path / "encoded" / "val"
    encode_shards(source, target, EMBEDDED_FOUNDATION)
    manifest = Manifest.load(tmp_path / "encoded" / "val")
    assert manifest is not None and manifest.complete and [shard.num_samples for shard in manifest.shards] == [2, 2, 1]
    found = batches(tmp_path / "encoded")
    assert found.keys() == from_shard.keys()
    for prompt, sample in found.items():
        assert torch.equal(sample["latents"], from_shard[prompt]["latents"])


def test_sizes_are_read_from_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    buckets = [Bucket(64, 64, 9), Bucket(32, 128, 9)]
    assert {tuple(s["video"].shape) for s in batches(tmp_path, buckets=buckets).values()} == {(1, 9, 3, 64, 64)}


def counts(path: Path) -> dict[str, int]:
    data = VideoTextDataModule(shards=str(path), batch_size=2, num_workers=0, precompute=False)
    data.prepare_data()
    data.setup("validate")
    arrived = [key for batch in data.val_dataloader() for key in batch["key"]]
    reasons: dict[str, int] = {"kept": len(arrived)}
    for _, _, reason in data.errors.seen:
        reasons[reason] = reasons.get(reason, 0) + 1
    return reasons


def test_damaged_rows_are_counted(tmp_path: Path) -> None:
    good = {"video": "clip.mp4", **texts(0)}
    (tmp_path / "clip.mp4").write_bytes(good_sample(0)["mp4"])
    (tmp_path / "text.mp4").write_text("no video")
    rows: list[Any] = [
        good,
        {**good, "video": "nowhere.mp4"},
        {**good, "video": "text.mp4"},
        {**good, "video": 3},
        {"video": "clip.mp4"},
        [1],
        {**good, "caption": 5},
        {**good, "video": "a\0b"},
        texts(1),
        {**good, "prompt": "half \ud83d"},
        {**good, "qa": [{"question": "?", "answer": "a", "kind": ["x"]}]},
        good,
    ]
    lines = [json.dumps(row) for row in rows] + ["{", '"cut', f'{{"id": {"9" * 5000}}}', "[" * 100_000]
    (tmp_path / "val.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"video": "\xff"}')
    assert counts(tmp_path) == {
        "kept": 2,
        "unreadable_video": 2,
        "wrong_type": 5,
        "missing_field": 1,
        "corrupt_json": 1,
        "corrupt_row": 6,
    }
    with pytest.raises(DataError, match=r"val\.jsonl: sample '0000000"):
        data = VideoTextDataModule(shards=str(tmp_path), num_workers=0, precompute=False, strict=True)
        data.prepare_data()
        data.setup("validate")
        list(data.val_dataloader())


def test_a_column_of_that_name_may_be_no_scene(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(good_sample(0)["mp4"])
    column = ["a beach", '{"weather": "fog"}', json.dumps(scenes.sample_scene(0).to_dict())]
    with (tmp_path / "val.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["video", "prompt", "caption", "scene"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"video": "clip.mp4", **texts(0), "prompt": f"{i}", "scene": s} for i, s in enumerate(column))
    found = batches(tmp_path)
    world = json.loads(column[2])
    assert [found[f"{i}"]["scene"] for i in range(3)] == [[None], [None], [world]]


def test_damaged_tables_are_counted(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(good_sample(0)["mp4"])
    caption = texts(0)["caption"]
    rows = [f"clip.mp4,red,{caption!r},", "clip.mp4,red,,", ",red,x,", "clip.mp4,red,x,[", "clip.mp4,a,b,,d,e"]
    path = tmp_path / "val.csv"
    path.write_text("\n".join(["video,prompt,caption,qa", rows[0].replace("'", '"'), *rows[1:]]))
    assert counts(tmp_path) == {
        "kept": 1,
        "corrupt_json": 1,
        "corrupt_row": 1,
        "wrong_type": 1,
    }  # an empty caption is too short
    path.write_bytes(path.read_bytes() + b"\nclip.mp4,\xff\xfe,x,\n")
    refs, errors = index_folder(path)
    assert len(refs) <= 2 and errors[-1].reason == "damaged_shard"


def test_damaged_files_are_counted(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "val", 2)
    (folder / "alone.mp4").write_bytes(good_sample(0)["mp4"])
    (folder / "texts.json").write_text(json.dumps(texts(0)))
    (folder / "twice.mp4").write_bytes(good_sample(0)["mp4"])
    (folder / "twice.MP4").write_bytes(good_sample(0)["mp4"])
    assert counts(tmp_path) == {"kept": 2, "missing_field": 2, "duplicate_member": 1}


def test_names_with_dots_and_tars_in_folders_below(tmp_path: Path) -> None:
    for name in ("shot.001", "shot.002", "shot_002", "b.c/shot.001"):  # the second and third have one key in a shard
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / f"{name}.mp4").write_bytes(good_sample(0)["mp4"])
        (tmp_path / "val" / f"{name}.json").write_text(json.dumps(texts(0)))
    write_raw(tmp_path / "val" / "below" / "a.TAR", [("0", good_sample(1)), ("1", good_sample(2))])
    (tmp_path / "val" / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "val" / "below" / "a.TAR").read_bytes()))
    assert counts(tmp_path) == {"kept": 4, "duplicate_member": 1, "damaged_shard": 1}
    (error,) = scan_shard(tmp_path / "val" / "b.tar.gz")[1]
    assert "b.tar.gz: damaged_shard: a compressed tar; decompress it" in str(error)
    manifest = encode_shards(tmp_path / "val", tmp_path / "encoded", EMBEDDED_FOUNDATION)
    assert manifest.counts == {"kept": 4, "duplicate_member": 1, "damaged_shard": 1}
    assert [shard.name for shard in manifest.shards] == [
        "b.tar.gz-000000.tar",
        "below--a.TAR-000000.tar",
        "files-000000.tar",
    ]


def test_a_tar_within_a_tar_is_named(tmp_path: Path) -> None:
    write_raw(tmp_path / "val" / "in.tar", [("0", good_sample(0))])
    inner = (tmp_path / "val" / "in.tar").read_bytes()
    write_raw(tmp_path / "val" / "in.tar", [("0", good_sample(0)), ("nested", {"tar": inner})])
    assert counts(tmp_path) == {"kept": 1, "missing_field": 1}


def test_an_open_quote_is_an_error_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(good_sample(0)["mp4"])
    rows = [f'clip.mp4,{i},"{texts(i)["caption"]}"' for i in range(3)]
    rows[1] = rows[1].removesuffix('"')
    (tmp_path / "val.csv").write_text("\n".join(["video,prompt,caption", *rows]))
    refs, (error,) = index_folder(tmp_path / "val.csv")
    assert len(refs) == 1 and "after 1 rows" in str(error) and "val.csv:3: a quote is not closed" in str(error)


def test_empty_texts_are_the_same_in_every_list(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(good_sample(0)["mp4"])
    row = {"video": "clip.mp4", "prompt": "", "caption": texts(0)["caption"]}
    (tmp_path / "val.csv").write_text(f'video,prompt,caption\nclip.mp4,,"{row["caption"]}"\n')
    assert batches(tmp_path).keys() == {""}
    (tmp_path / "val.csv").unlink()
    (tmp_path / "val.jsonl").write_text(json.dumps(row))
    assert batches(tmp_path).keys() == {""}


def test_a_list_beside_its_videos_says_which_are_taken(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "val", 3)
    (folder / "unlisted.mp4").write_bytes(good_sample(0)["mp4"])
    (folder / "list.jsonl").write_text(json.dumps({"video": "clip 0.mp4", **texts(1)}))
    assert counts(tmp_path) == {"kept": 1}


def test_folders_without_samples_are_named(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"val: holds no \.tar shard, no \.csv or \.jsonl list, and no video"):
        batches(tmp_path)
