from __future__ import annotations

import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset

from tests.damage import is_intact, write_raw
from tests.data.conftest import FAULTS
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.index import index_folder, scan_shard
from univigu.data.sample import DataError, SampleError, SampleRef
from univigu.data.shards import Manifest, write_shard
from univigu.data.sources import encode_shards
from univigu.data.video import read_video
from univigu.shapes import renderer, scenes, texts
from univigu.shapes.write import write_shapes


def folders(world: dict[str, Any]) -> tuple[Path, Path]:
    base = next(Path(world["root"]).iterdir())
    return base / "train", next(base.glob("latents-*")) / "train"


def test_webdataset_reads_both_kinds_of_shards(world: dict[str, Any]) -> None:
    videos, latents = folders(world)
    for folder, suffixes in ((videos, {"mp4"}), (latents, {"latents.safetensors", "prompt.safetensors"})):
        paths = [str(path) for path in sorted(folder.glob("*.tar"))]
        samples = list(webdataset.WebDataset(paths, shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [f"{seed:08d}" for seed in range(13)]
        wanted = suffixes | {"json"}
        assert all(wanted == {name for name in sample if not name.startswith("_")} for sample in samples)
        refs, errors = index_folder(folder)
        assert not errors
        found = [{suffix: ref.read(suffix) for suffix in ref.members} for ref in refs]
        assert found == [{suffix: s[suffix] for suffix in wanted} for s in samples]


def test_samples_are_what_was_rendered(world: dict[str, Any]) -> None:
    refs, _ = index_folder(folders(world)[0])
    for seed in (0, 12):
        sample = refs[seed].texts()
        scene = scenes.sample_scene(seed)
        assert scenes.Scene.from_dict({**sample["scene"], "objects": scene.to_dict()["objects"]})
        assert sample["prompt"] == texts.prompt_of(scene)
        assert sample["caption"] == texts.caption_of(scene)
        difference = read_video(refs[seed].read("mp4"), 9, 64, 64).float() - renderer.render(scene).float()
        assert difference.abs().mean() < 6  # 4:2:0 chroma and compression
    with pytest.raises(ValueError, match="num_clips=0"):
        write_shapes("anywhere", "train", 0)


def test_same_input_gives_same_bytes(tmp_path: Path, clips: list[dict[str, bytes]]) -> None:
    samples = [(f"{i:04d}", members) for i, members in enumerate(clips[:2])]
    first = write_shard(tmp_path / "a.tar", samples)
    (tmp_path / "other").mkdir()
    reordered = [(key, dict(reversed(members.items()))) for key, members in samples]
    second = write_shard(tmp_path / "other" / "a.tar", reordered)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "other" / "a.tar").read_bytes()
    assert first == second
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}
    changed = write_shard(tmp_path / "b.tar", [("0000", {**clips[0], "json": b"{}"}), samples[1]])
    assert changed.sha256 != first.sha256


def test_a_shard_appears_only_when_whole(tmp_path: Path, clips: list[dict[str, bytes]]) -> None:
    def interrupted() -> Any:
        yield "0", clips[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", interrupted())
    assert list(tmp_path.iterdir()) == []
    for keys in (["a.b"], ["a", "a"], [""]):
        with pytest.raises(ValueError, match="expected a name without dots"):
            write_shard(tmp_path / "a.tar", [(key, clips[0]) for key in keys])


def test_errors_name_file_field_and_value(faulty: Path) -> None:
    refs, errors = index_folder(faulty / "train")
    for ref in refs:
        try:
            ref.texts()
        except SampleError as error:
            errors.append(error)
    by_key = {error.key: error for error in errors if error.key}
    assert by_key["number-prompt"].field == "prompt" and "3" in by_key["number-prompt"].value
    assert by_key["no-caption"].field == "caption"
    assert by_key["cut"].shard.endswith("d-cut.tar") and "bytes too early" in by_key["cut"].value
    assert all(str(faulty) in str(error) and error.reason in str(error) for error in errors)


def test_damage_that_tarfile_takes_for_the_end(tmp_path: Path, clips: list[dict[str, bytes]]) -> None:
    path = tmp_path / "a.tar"
    write_raw(path, [(f"{i}", clips[i]) for i in range(3)])
    whole, third = path.read_bytes(), path.read_bytes().index(b"2.mp4")
    path.write_bytes(whole[:third] + b"\xff" * 512 + whole[third + 512 :])
    refs, errors = scan_shard(path)
    assert [ref.key for ref in refs] == ["0", "1"]
    assert [(e.reason, e.key) for e in errors] == [("damaged_shard", None)] and f"byte {third}" in errors[0].value
    path.write_bytes(whole[:third])
    refs, errors = scan_shard(path)
    assert len(refs) == 2 and "cut off" in errors[0].value
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(SampleError, match="damaged_shard"):  # cut off after it was indexed
        refs[0].read("mp4")


def test_names_with_folders_and_unsorted_members(tmp_path: Path, clips: list[dict[str, bytes]]) -> None:
    write_raw(tmp_path / "a.tar", [("./0", clips[0]), ("../x.d/1", clips[1])])
    assert [ref.key for ref in scan_shard(tmp_path / "a.tar")[0]] == ["0", "__/x_d/1"]  # what write_shard takes
    write_raw(tmp_path / "b.tar", [("0", {"mp4": b""}), ("1", clips[1]), ("0", {"json": b"{}"})])
    refs, (error,) = scan_shard(tmp_path / "b.tar")
    assert [ref.key for ref in refs] == ["1"] and "sort the members of the tar by name" in str(error)


def test_dotted_folders_in_names_cost_nothing_with_and_without_latents(
    tmp_path: Path, foundation: str, clips: list[dict[str, bytes]]
) -> None:
    """As ``tar -C folder -cf 0.tar .`` writes them."""
    keys = ["./0000", "./.hidden/1", "../x", "a.b/c", "/root/2"]
    for split in ("train", "val", "test"):
        write_raw(tmp_path / split / "0.tar", [(key, clips[i]) for i, key in enumerate(keys)])
    found = []
    for precompute in (False, True):
        data = VideoTextDataModule(foundation, shards=str(tmp_path), num_workers=0, batch_size=5, precompute=precompute)
        data.prepare_data()
        data.setup("validate")
        (batch,) = data.val_dataloader()
        assert ("latents" in batch) == precompute and data.filter_counts["val"] == {"kept": 5}
        found.append(batch["key"])
    assert found[0] == found[1] == ["0000", "_hidden/1", "__/x", "a_b/c", "/root/2"]


def _changed(**changes: Any) -> dict[str, Any]:
    """A scene of two objects, but for some fields, of which those of an object are the first one's."""
    scene = next(s for s in map(scenes.sample_scene, range(99)) if s.relation and s.objects[0].speed).to_dict()
    first = {name: value for name, value in changes.items() if name not in scene}
    objects = [scene["objects"][0] | first, *scene["objects"][1:]]
    return {**scene, "objects": objects, **{name: value for name, value in changes.items() if name in scene}}


@pytest.mark.parametrize(
    "scene",
    [
        "a beach",
        3,
        [],
        ["red"],
        {},
        {"weather": "fog"},
        *(_changed(objects=objects) for objects in ([], {}, ["red"], 3 * _changed()["objects"])),
        *(_changed(background=value) for value in ("beach", ["gray"])),
        *(_changed(relation=value) for value in ("", "behind")),
        *(_changed(shape=value) for value in ("cat", ["cat"])),
        *(_changed(motion=value) for value in ("away", "still")),
        *(_changed(**change) for change in ({"size": "tiny"}, {"color": "pink"}, {"speed": ""}, {"mood": "calm"})),
        *(_changed(**change) for change in ({"x": "left"}, {"x": float("nan")}, {"y": 10**400})),
        _changed(background=None),
    ],
    ids=lambda scene: str(scene)[:40],
)
def test_a_scene_of_another_world_is_none(scene: Any) -> None:
    """Whatever goes by that name in someone's own metadata neither costs the sample nor meets the exact metrics."""
    texts = SampleRef("", "k", {"json": json.dumps({"prompt": "a", "caption": "b", "scene": scene}).encode()}).texts()
    assert texts["scene"] is None and texts["prompt"] == "a"


def test_a_scene_of_the_embedded_world_is_kept() -> None:
    drawn = [scenes.sample_scene(seed, split).to_dict() for seed in range(50) for split in ("train", "val", "test")]  # type: ignore[arg-type]
    for scene in [*drawn, {**_changed(), "more": 1}]:
        raw = json.dumps({"prompt": "a", "caption": "b", "scene": scene}).encode()
        assert SampleRef("a.tar", "k", {"json": raw}).texts()["scene"] == json.loads(json.dumps(scene))


def test_errors_travel_between_processes() -> None:
    error = SampleError("wrong_type", "a.tar", "k", "prompt", "x" * 900)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.reason == "wrong_type" and len(str(error)) < 300
    assert isinstance(error, DataError)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (b"nonsense", "corrupt_latents"),
        ({"other": torch.zeros(8, 3, 8, 8)}, "corrupt_latents"),
        ({"latents": torch.full((8, 3, 8, 8), torch.nan)}, "corrupt_latents"),
        ({"latents": torch.zeros(8, 8, 8)}, "wrong_shape"),
    ],
)
def test_faulty_latents_are_named(tensors: Any, reason: str) -> None:
    from safetensors.torch import save

    raw = tensors if isinstance(tensors, bytes) else save(tensors)
    with pytest.raises(SampleError, match=reason):
        SampleRef("a.tar", "k", {"latents.safetensors": raw}).tensors("latents.safetensors", "latents")


def test_manifests_know_their_shards(tmp_path: Path) -> None:
    names = [f"val-00000{i}.tar" for i in range(3)]
    manifest = write_shapes(tmp_path, "val", 5, shard_size=2)
    assert [shard.name for shard in manifest.shards] == names and manifest.complete and manifest.counts == {"kept": 5}
    assert Manifest.load(tmp_path) == manifest and is_intact(tmp_path)
    (tmp_path / names[0]).write_bytes(bytes((tmp_path / names[0]).stat().st_size))
    (tmp_path / names[1]).unlink()
    (tmp_path / names[2]).write_bytes(b"cut")
    assert manifest.check_files(tmp_path) == names[1:]
    for text in ("{}", "{", '{"shards": [{"name": 1}]}', "[" * 100_000, f'{{"shards": {"9" * 5000}}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match="not a manifest"):
            Manifest.load(tmp_path)


def test_encoding_counts_and_keeps_going(
    faulty: Path, foundation: str, clips: list[dict[str, bytes]], tmp_path: Path
) -> None:
    manifest = encode_shards(faulty / "train", tmp_path / "latents", foundation)
    assert Counter(error.reason for error in manifest.skipped(faulty / "train")) == FAULTS
    refs, damage = index_folder(tmp_path / "latents")
    assert sorted(ref.key for ref in refs) == [f"good{i}" for i in range(5)] and not damage
    assert [ref.read("json") for ref in refs if ref.key == "good0"] == [clips[0]["json"]]
    assert encode_shards(faulty / "train", tmp_path / "latents", foundation) == manifest
    with pytest.raises(SampleError, match=r"a\.tar: sample '.*': "):
        encode_shards(faulty / "train", tmp_path / "strict", foundation, strict=True)
    saved = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert saved["kind"] == "latents" and saved["num_samples"] == 5 and saved["parameters"]["dtype"] == "float32"
