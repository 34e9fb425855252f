from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from tests.damage import write_raw
from tests.data.conftest import FAULTS, fit
from univigu.data import datamodule, sources
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.options import LengthFilter
from univigu.data.sample import DataError, SampleError
from univigu.data.video import to_model_range
from univigu.models.encode import encode_clips
from univigu.models.foundation import Foundation
from univigu.models.tokens import detokenize


def make(world: dict[str, Any], stage: str | None = "fit", **changes: Any) -> VideoTextDataModule:
    data = VideoTextDataModule(**{**world, **changes})
    if stage:
        data.setup(stage)
    return data


def test_batches_are_what_the_model_expects(world: dict[str, Any]) -> None:
    data = make(world)
    assert data.filter_counts == {"train": {"kept": 13}, "val": {"kept": 5}}
    train = list(data.train_dataloader())
    assert [len(batch["key"]) for batch in train] == [2] * 6
    batch = train[0]
    channels = Foundation(world["foundation"]).vae.config.z_dim
    assert batch["latents"].shape == (2, channels, 3, 8, 8) and batch["latents"].dtype == torch.float32
    assert batch["prompt_ids"].shape == (2, 64) and batch["caption_ids"].shape == (2, 256)
    assert batch["prompt_ids"].dtype == torch.int64
    assert detokenize(data.tokenizer, batch["caption_ids"]) == batch["caption"]
    assert all(scene["background"] in prompt for scene, prompt in zip(batch["scene"], batch["prompt"], strict=True))
    val = list(data.val_dataloader())
    assert [len(batch["key"]) for batch in val] == [2, 2, 1]
    assert [key for batch in val for key in batch["key"]] == [f"{seed:08d}" for seed in range(5)]
    assert [b["key"] for b in data.val_dataloader()] == [b["key"] for b in val]


def test_precomputed_latents_are_those_of_encoding_on_the_fly(world: dict[str, Any]) -> None:
    stored = list(make(world).val_dataloader())
    frames = list(make(world, precompute=False).val_dataloader())
    vae = Foundation(world["foundation"]).vae
    for latents, video in zip(stored, frames, strict=True):
        assert latents["key"] == video["key"] and "latents" not in video
        assert video["video"].dtype == torch.uint8 and video["video"].shape[1:] == (9, 3, 64, 64)
        with torch.no_grad():
            encoded = encode_clips(vae, to_model_range(video["video"]))
        # another batch size sums in another order: 4e-7 in the VAE's units, divided by a deviation of 0.07
        torch.testing.assert_close(latents["latents"], encoded, atol=1e-5, rtol=0)
    assert 0.3 < torch.cat([b["latents"] for b in stored]).std() < 3  # normalised


def test_workers_load_what_the_main_process_loads(world: dict[str, Any]) -> None:
    for precompute in (False, True):
        here, there = (make(world, precompute=precompute, num_workers=n).val_dataloader() for n in (0, 2))
        for ours, theirs in zip(here, there, strict=True):
            name = "latents" if precompute else "video"
            assert ours["key"] == theirs["key"] and torch.equal(ours[name], theirs[name])


def test_preparing_and_setup_do_not_load_the_decoder(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # an import raises ImportError
    data = make(world, stage=None)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_dataloader()) == 6


def test_prepared_data_are_left_alone(world: dict[str, Any]) -> None:
    files = {p: p.stat().st_mtime_ns for p in Path(world["root"]).rglob("*") if p.is_file()}
    written = [path for path in files if path.name != ".lock"]
    assert len(written) == 12  # a shard and a manifest for each of three splits, twice
    make(world, stage=None).prepare_data()
    assert files == {p: p.stat().st_mtime_ns for p in Path(world["root"]).rglob("*") if p.is_file()}


def test_latents_of_another_vae_or_size_are_refused(world: dict[str, Any], tmp_path: Path) -> None:
    base = next(Path(world["root"]).iterdir())
    latents = next(base.glob("latents-*"))
    with pytest.raises(DataError, match=r"encoded with height=64, this run has height=32"):
        make(world, shards=str(latents), height=32, width=32)
    assert len(list(make(world, shards=str(latents)).train_dataloader())) == 6  # used as they are
    other = tmp_path / "foundation"
    shutil.copytree(world["foundation"], other)
    config = json.loads((other / "vae" / "config.json").read_text())
    config["latents_std"][0] *= 2
    (other / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"latents were encoded with vae='[0-9a-f]{16}', this run has vae="):
        make(world, shards=str(latents), foundation=str(other))
    with pytest.raises(DataError, match="has not been encoded; run prepare_data first"):
        make(world, foundation=str(other))
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    make(world, shards=str(copy))
    shutil.copy(base / "train" / "train-000000.tar", copy / "val" / "val-000000.tar")
    with pytest.raises(DataError, match="latents were encoded with source="):
        make(world, shards=str(copy))
    manifest = json.loads((latents / "train" / "manifest.json").read_text())
    (copy / latents.name / "train" / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(DataError, match="only partly encoded"):
        make(world, shards=str(copy / latents.name))


# -------------------------------------------------------------- broken samples


@pytest.fixture
def faulty_world(world: dict[str, Any], faulty: Path) -> dict[str, Any]:
    for split in ("val", "test"):
        shutil.copytree(faulty / "train", faulty / split)
    return {**world, "shards": str(faulty), "precompute": False}


def test_broken_samples_are_skipped_and_counted(faulty_world: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "univigu.data.loader")
    data = make(faulty_world, stage="fit")
    seen_at_setup = {reason: n for reason, n in FAULTS.items() if reason != "unreadable_video"}
    assert data.filter_counts["train"] == {"kept": 8, **seen_at_setup}  # videos are only opened when needed
    loader = data.train_dataloader()
    first = [batch["key"] for batch in loader]
    second = [batch["key"] for batch in loader]
    assert [len(keys) for keys in first + second] == [2] * 8  # others took their places
    assert {key for keys in first + second for key in keys} == {f"good{i}" for i in range(5)}
    val = [key for batch in data.val_dataloader() for key in batch["key"]]
    assert sorted(set(val)) == [f"good{i}" for i in range(5)] and len(val) <= 6
    assert data.errors.counts["unreadable_video"] == 6  # three a split, however often they are met
    assert sum("'text-video': unreadable_video" in message for message in caplog.messages) == 2
    assert [batch["key"] for batch in make(faulty_world).train_dataloader()] == first


def test_errors_do_not_hold_on_to_videos(faulty_world: dict[str, Any]) -> None:
    """A traceback would, until the garbage collector comes by: a few frames of 8K are gigabytes."""
    dataset = make(faulty_world, stage="fit").train_dataloader()._loader.dataset  # type: ignore[attr-defined]
    found = [error for number in range(len(dataset)) for error in dataset[[number]][1]]
    assert len(found) >= 3
    assert all(error.__traceback__ is error.__cause__ is error.__context__ is None for error in found)


def test_strict_mode_names_shard_and_key(faulty_world: dict[str, Any], faulty: Path) -> None:
    with pytest.raises(SampleError, match=r"b-empty\.tar: damaged_shard: empty file"):
        make(faulty_world, strict=True)
    for name in ("b-empty", "c-text", "d-cut", "e-twice"):
        (faulty / "train" / f"{name}.tar").unlink()
    with pytest.raises(SampleError, match=r"a\.tar: sample 'no-json': missing_field in 'json'"):
        make(faulty_world, strict=True)
    data = make(faulty_world)
    data.errors.strict = True
    with pytest.raises(SampleError, match=r"a\.tar: sample '(text|empty|cut)-video': unreadable_video"):
        for _ in range(3):
            list(data.train_dataloader())


def test_nothing_left_is_an_error_with_counts(world: dict[str, Any], faulty_world: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"no sample is left for train: \{'kept': 0, 'caption_short': 13\}"):
        make(world, length_filter=LengthFilter(min_caption=250))
    with pytest.raises(DataError, match=r"no sample is left for train: \{'kept': 0, 'text_over_slot': 13\}"):
        make(world, prompt_length=3)
    with pytest.raises(DataError, match=r"sample '00000000': text_over_slot in 'prompt'"):
        make(world, prompt_length=3, strict=True)
    data = make(faulty_world)
    data._refs["val"] = [ref for ref in data._refs["val"] if "good" not in ref.key]
    with pytest.raises(DataError, match=r"none of 3 samples can be read: .*'unreadable_video': 3\}"):
        list(data.val_dataloader())


def test_latents_of_the_wrong_shape_are_skipped(world: dict[str, Any]) -> None:
    data = make(world)
    loader = data.val_dataloader()
    loader._loader.dataset.latents_shapes = [(2, 8, 8)]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"none of 5 samples can be read: \{'wrong_shape': 5\}"):
        list(loader)


# -------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "data.batch_size=0: expected at least 1"),
        ({"num_val_clips": 0}, "data.num_val_clips=0"),
        ({"num_frames": 8}, r"data.num_frames=8: expected 4k\+1"),
        ({"height": 60}, "data.height=60: expected a multiple of 16"),
        (
            {"height": 360, "width": 640},
            "data.height=360: expected a multiple of 16 for this foundation's VAE and transformer",
        ),
        ({"shards": "/nowhere"}, "/nowhere/train: no such folder of shards"),
        ({"foundation": "/nowhere"}, "foundation='/nowhere'"),
    ],
)
def test_unusable_arguments_are_named(world: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(world, stage=None, **changes).prepare_data()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 100}, "data.height=100: expected a multiple of 16"),
        ({"width": 72}, "data.width=72: expected a multiple of 16"),
        ({"num_frames": 10}, r"data.num_frames=10: expected 4k\+1"),
    ],
)
def test_prediction_has_sizes_of_whole_tokens_too(world: dict[str, Any], size: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(world, "predict", prompts="a", **size)
    make(world, "predict", prompts="a", height=48, width=80, num_frames=5)


def test_the_transformer_decides_what_a_token_is(world: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "foundation"
    shutil.copytree(world["foundation"], other)
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps({**config, "patch_size": [3, 1, 4]}))
    arguments = {**world, "foundation": str(other), "prompts": "a"}
    make(arguments, "predict", height=72, width=64, num_frames=9)  # 3 latent frames
    for size, message in (
        ({"width": 48}, "data.width=48: expected a multiple of 32"),
        ({"num_frames": 13}, r"data.num_frames=13: expected 12k\+9"),
    ):
        with pytest.raises(DataError, match=message):
            make(arguments, "predict", **size)
    (other / "transformer" / "config.json").write_text(json.dumps({**config, "patch_size": 2}))
    with pytest.raises(DataError, match=r"foundation='.*': no sizes in .*config\.json"):
        make(arguments, "predict")


def test_without_validation_no_validation_split_is_needed(tmp_path: Path, clips: list[dict[str, bytes]]) -> None:
    write_raw(tmp_path / "train" / "a.tar", [(f"{i}", clips[i]) for i in range(4)])
    data = VideoTextDataModule(shards=str(tmp_path), batch_size=2, num_workers=0)
    assert len(fit(data, tmp_path / "run", 2, limit_val_batches=0).seen) == 2
    assert list(data.val_dataloader()) == []
    with pytest.raises(DataError, match="/val: no such folder of shards"):
        fit(VideoTextDataModule(shards=str(tmp_path), batch_size=2, num_workers=0), tmp_path, 2, limit_val_batches=1)


# --------------------------------------------------------------- questions


def test_questions_take_the_place_of_texts(
    world: dict[str, Any], tmp_path: Path, clips: list[dict[str, bytes]]
) -> None:
    pairs = [{"question": "which color?", "answer": "red"}, {"question": "which shape?", "answer": "circle"}]
    samples = []
    for number, qa in enumerate((pairs, None, pairs[:1], [])):
        texts = {**json.loads(clips[number]["json"]), **({} if qa is None else {"qa": qa})}
        samples.append((f"{number}", {**clips[number], "json": json.dumps(texts).encode()}))
    for split in ("train", "val", "test"):
        write_raw(tmp_path / split / "a.tar", samples)
    options = {"shards": str(tmp_path), "texts": "qa", "length_filter": LengthFilter(min_caption=0), "batch_size": 1}
    for precompute in (False, True):
        data = make(world, stage=None, precompute=precompute, **options)
        data.prepare_data()
        data.setup("fit")
        assert data.filter_counts["train"] == {"kept": 3, "no_question": 2}
        batches = list(data.val_dataloader())
        assert [(b["key"][0], b["prompt"][0], b["caption"][0]) for b in batches] == [
            ("0", "which color?", "red"),
            ("0", "which shape?", "circle"),
            ("2", "which color?", "red"),
        ]
        assert detokenize(data.tokenizer, batches[1]["prompt_ids"]) == ["which shape?"]
        assert ("latents" in batches[0]) == precompute and "prompt_embeds" not in batches[0]  # they are the prompt's


# --------------------------------------------------------------- encoding


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows that a GPU is asked for by its absence")
def test_encoding_runs_where_training_runs(
    tmp_path: Path, foundation: str, clips: list[dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datamodule, "this_device", lambda: "cuda:0")
    for split in ("train", "val", "test"):
        write_raw(tmp_path / split / "a.tar", [("0", clips[0])])
    module = VideoTextDataModule(foundation, shards=str(tmp_path))
    devices: list[str] = []
    with monkeypatch.context() as patch:  # a small VAE is faster on the cores of the CPU
        patch.setattr(datamodule, "encode_shards", lambda *args, device: devices.append(device))
        module.prepare_data()
        assert devices == ["cpu"] * 3
    monkeypatch.setitem(sources.LARGE, "vae", 1000)
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda"):
        module.prepare_data()
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    devices.clear()
    monkeypatch.setattr(datamodule, "encode_shards", lambda *args, device: devices.append(device))
    module.prepare_data()
    assert devices == ["cpu"] * 3  # training on the CPU does not use a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_encodes_in_another_process(tmp_path: Path, foundation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.LARGE, "vae", 1000)
    before = torch.cuda.memory_allocated()
    module = VideoTextDataModule(foundation, str(tmp_path), num_train_clips=5, num_val_clips=2)
    module.prepare_data()
    module.setup("fit")
    assert torch.cuda.memory_allocated() == before and "latents" in next(iter(module.val_dataloader()))


def test_lightning_stops_the_workers(world: dict[str, Any]) -> None:
    """By a private attribute of DataLoader, which the loader passes on."""
    from lightning.pytorch.utilities.combined_loader import CombinedLoader, _shutdown_workers_and_reset_iterator

    loader = make(world, num_workers=1).val_dataloader()
    combined = CombinedLoader(loader)
    next(iter(combined))
    workers = loader._iterator._workers
    assert all(worker.is_alive() for worker in workers)
    _shutdown_workers_and_reset_iterator(loader)
    assert loader._iterator is None and not any(worker.is_alive() for worker in workers)
