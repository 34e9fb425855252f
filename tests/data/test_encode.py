"""Precomputed latents and prompt embeddings: the same training, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset

from tests.conftest import RealPool
from tests.damage import is_intact
from tools.encode import main
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.index import index_folder
from univigu.data.sample import DataError, SampleError, SampleRef
from univigu.data.shards import Manifest
from univigu.data.sources import encode_shards
from univigu.shapes.write import write_shapes
from univigu.training.module import UniViGU
from univigu.training.stages import Stage


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 3), ("val", 3)):
        write_shapes(folder / split, split, count, shard_size=2)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def encoded(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The videos, encoded by the command, by dtype."""
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        found[dtype] = tmp_path_factory.mktemp(dtype)
        assert main(["--source", str(videos), "--output", str(found[dtype]), "--dtype", dtype, "--workers", "1"]) == 0
    return found


@pytest.mark.slow
def test_a_pools_processes_write_the_same(
    videos: Path, encoded: dict[str, Path], foundation: str, tmp_path: Path
) -> None:
    with RealPool(1) as pool:
        write_shapes(tmp_path / "videos", "train", 3, shard_size=2, engine=pool.map)
        encode_shards(tmp_path / "videos", tmp_path / "latents", foundation, engine=pool.map)
        assert pool.submit(os.getpid).result() != os.getpid()
    for made, expected in (("videos", videos), ("latents", encoded["float32"])):
        for path in (expected / "train").glob("*.tar"):
            assert (tmp_path / made / path.name).read_bytes() == path.read_bytes()


def data(shards: Path, **changes: Any) -> VideoTextDataModule:
    options: dict[str, Any] = {"batch_size": 3, "num_workers": 0, "prompt_length": 32, "precompute": False}
    module = VideoTextDataModule(shards=str(shards), **options | changes)
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.fixture(scope="module")
def module() -> UniViGU:
    model = UniViGU()
    model.enter_stage(Stage(target="caption", text_length=256))
    model.configure_model()
    return model


def inputs(module: UniViGU, shards: Path, **changes: Any) -> list[dict[str, torch.Tensor]]:
    """What the objective is given, batch by batch, over one and a half epochs of training and in validation."""
    loaded = data(shards, **changes)
    train = loaded.train_dataloader()
    batches = [*train, *train, *loaded.val_dataloader()]
    return [{name: t for name, t in vars(module.prepare(batch)).items() if t is not None} for batch in batches]


@pytest.mark.slow
def test_training_is_given_the_same_bits(module: UniViGU, videos: Path, encoded: dict[str, Path]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # the command's processes have one each
    try:
        fly, stored = (inputs(module, folder) for folder in (videos, encoded["float32"]))
    finally:
        torch.set_num_threads(before)
    assert len(fly) == len(stored) == 3
    for a, b in zip(fly, stored, strict=True):
        assert set(a) == {"latents", "prompt_embeds", "null_embeds", "text_ids"} == set(b)
        for name in a:
            assert a[name].shape == b[name].shape and torch.equal(a[name], b[name]), name
    assert [loss(module, batch) for batch in fly[:2]] == [loss(module, batch) for batch in stored[:2]]


def loss(module: UniViGU, batch: dict[str, torch.Tensor]) -> float:
    from univigu.flow.objective import UniFlowBatch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        losses = module.objective(module._model, UniFlowBatch(**batch), (1, 1, 1), generator=generator)
    return float(losses.total(3))


@pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_half_the_storage_costs_its_rounding_and_no_more(
    module: UniViGU, encoded: dict[str, Path], dtype: str, unit: float
) -> None:
    full, half = (inputs(module, encoded[name]) for name in ("float32", dtype))
    for a, b in zip(full, half, strict=True):
        for name in ("latents", "prompt_embeds", "null_embeds"):
            assert torch.equal(a[name].to(getattr(torch, dtype)).float(), b[name])
            error = (a[name] - b[name]).norm() / a[name].norm()
            assert 0 < error < unit / 2, f"{name}: {error:.2e}"
        assert loss(module, b) == pytest.approx(loss(module, a), rel=1e-3)
    sizes = {name: sum(s.num_bytes for s in _manifest(encoded[name]).shards) for name in ("float32", dtype)}
    assert sizes[dtype] < sizes["float32"]


def _manifest(folder: Path) -> Manifest:
    manifest = Manifest.load(folder / "train")
    assert manifest is not None
    return manifest


def test_the_manifest_says_what_made_them(encoded: dict[str, Path], videos: Path) -> None:
    manifest = _manifest(encoded["bfloat16"])
    recorded = manifest.parameters
    assert manifest.complete and manifest.kind == "latents" and manifest.counts == {"kept": 3}
    assert recorded["dtype"] == "bfloat16" and recorded["normalization"]["of"] == "mode"
    assert all(len(recorded[name]) == 16 for name in ("vae", "text_encoder", "tokenizer"))
    source = Manifest.load(videos / "train")
    assert source is not None
    assert [row[2] for row in recorded["source"]] == [shard.sha256 for shard in source.shards]
    assert is_intact(encoded["bfloat16"] / "train")
    paths = [str(path) for path in sorted((encoded["float32"] / "train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert {name for name in samples[0] if name[0] != "_"} == {"json", "latents.safetensors", "prompt.safetensors"}


def test_other_encoders_are_refused(videos: Path, encoded: dict[str, Path], tmp_path: Path, foundation: str) -> None:
    other = tmp_path / "foundation"
    shutil.copytree(foundation, other)
    assert data(encoded["float32"], foundation=str(other))  # a copy is the same
    config = json.loads((other / "tokenizer" / "tokenizer_config.json").read_text())
    (other / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 77}))
    with pytest.raises(DataError, match=r"encoded with tokenizer='\w+', this run has tokenizer='\w+'"):
        data(encoded["float32"], foundation=str(other))
    config = json.loads((other / "vae" / "config.json").read_text())
    config["latents_mean"][0] += 1
    (other / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="encoded with vae="):
        data(encoded["float32"], foundation=str(other))
    bare = tmp_path / "bare"
    shutil.copytree(encoded["float32"], bare)
    (bare / "train" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"holds latents but no manifest\.json"):
        data(bare)


def test_latents_alone_leave_prompts_to_training(module: UniViGU, videos: Path, tmp_path: Path) -> None:
    args = ["--source", str(videos), "--output", str(tmp_path), "--no-prompts", "--workers", "1"]
    assert main(args) == 0
    batch = next(iter(data(tmp_path).train_dataloader()))
    assert "latents" in batch and "prompt_embeds" not in batch
    assert module.prepare(batch).prompt_embeds.shape == (3, 32, 64)


def test_faulty_embeddings_are_named(encoded: dict[str, Path]) -> None:
    from safetensors.torch import save

    ref = index_folder(encoded["float32"] / "train")[0][0]
    sound = {"prompt": torch.zeros(4, 8), "null": torch.zeros(1, 8)}
    nan = torch.full((4, 8), torch.nan)
    for tensors, reason in (
        (b"x", "corrupt_embeds in 'prompt'"),
        ({"prompt": sound["prompt"]}, "corrupt_embeds in 'null'"),
        ({**sound, "prompt": nan}, "not all values are finite"),
        ({**sound, "null": torch.zeros(3)}, "wrong_shape in 'null'"),
    ):
        raw = tensors if isinstance(tensors, bytes) else save(tensors)
        with pytest.raises(SampleError, match=reason):
            SampleRef("a.tar", "k", {"prompt.safetensors": raw}).tensors("prompt.safetensors", "prompt", "null")
    dataset: Any = data(encoded["float32"]).train_dataloader()._loader.dataset
    ref.members["prompt.safetensors"] = save(sound)
    with pytest.raises(SampleError, match=r"wrong_shape in 'prompt': embeddings of 4 tokens, the prompt has \d+"):
        dataset.load(ref)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--source", "gone"], "gone: no such folder of shards"),
        (["--source", "{videos}", "--dtype", "int8"], "dtype='int8'"),
        (["--source", "{videos}", "--foundation", "gone"], "foundation='gone'"),
        (["--source", "{videos}", "--workers", "0"], "max_workers must be greater than 0"),
        (["--source", "{videos}", "--height", "72"], "size 72x64x9: height=72: expected a multiple of 16"),
        (["--source", "{videos}", "--num-frames", "10"], "size 64x64x10: num_frames=10: expected 4k+1"),
        (["--source", "{videos}", "--buckets", "64x64x9", "64x72x9"], "size 64x72x9: width=72: expected a multi"),
        (["--source", "{videos}", "--address", "auto"], "--address='auto': needs --engine ray"),
    ],
)
def test_mistakes_are_named(
    args: list[str], message: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [arg.format(videos=videos) for arg in args]
    assert main(["--output", str(tmp_path / "made"), *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
