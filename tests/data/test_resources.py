"""Where encoding runs within training, and in how many processes."""

from __future__ import annotations

import json
import logging
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from safetensors.torch import save_file

from tests.conftest import REPO
from univigu.data import build, datamodule, resources
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.shards import Manifest
from univigu.models.foundation import Foundation

SIZES = {"num_train_clips": 5, "num_val_clips": 2, "num_test_clips": 2}
tool = runpy.run_path(str(REPO / "tools" / "encode.py"))


def data(foundation: str, root: Path, **changes: Any) -> VideoTextDataModule:
    return VideoTextDataModule(foundation=foundation, root=str(root), **{**SIZES, **changes})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the pools of processes that are started, which is noted and done."""
    sizes: list[int] = []
    real = build.ProcessPoolExecutor

    def noted(workers: int, **options: Any) -> Any:
        sizes.append(workers)
        return real(workers, **options)

    monkeypatch.setattr(build, "ProcessPoolExecutor", noted)
    return sizes


def shards(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.tar")}


def huge(folder: Path, numbers: int) -> Path:
    """A file of bfloat16 numbers that has room for all of them on no disk: it holds its header alone."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"dtype": "BF16", "shape": [numbers // 1000, 1000], "data_offsets": [0, 2 * numbers]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": entry}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * numbers)
    return folder


def test_weights_are_counted_as_float32(tmp_path: Path, foundation: str) -> None:
    for name in ("text_encoder", "vae"):
        model = getattr(Foundation(foundation), name)
        held = sum(parameter.numel() * 4 for parameter in model.parameters())
        assert resources.weight_bytes(Path(foundation) / name) == pytest.approx(held, rel=0.05)
    assert resources.weight_bytes(huge(tmp_path / "a", 5_700_000_000)) == 4 * 5_700_000_000
    save_file({"x": torch.zeros(3, 5), "scalar": torch.zeros(())}, tmp_path / "a" / "more.safetensors")
    assert resources.weight_bytes(tmp_path / "a") == 4 * (5_700_000_000 + 16)
    (tmp_path / "b").mkdir()
    assert resources.weight_bytes(tmp_path / "b") == 0
    (tmp_path / "b" / "model.safetensors").write_bytes(b"\xff" * 100)
    assert resources.weight_bytes(tmp_path / "b") == 100
    available = resources.available_memory()
    assert available is None or 2**20 < available < 2**60


@pytest.mark.parametrize("limit, usage", resources.LIMITS)
def test_a_jobs_memory_is_what_it_has_left(
    limit: str, usage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "CONTROL_GROUPS", tmp_path)
    assert resources.available_memory() is not None  # the system's own count, where no group has a limit
    (tmp_path / limit).write_text("max\n")
    (tmp_path / usage).write_text("7\n")
    assert (resources.available_memory() or 0) > 2**20
    (tmp_path / limit).write_text("1000007\n")
    assert resources.available_memory() == 1_000_000
    (tmp_path / usage).write_text("2000000\n")
    assert resources.available_memory() == 0


def test_as_many_processes_as_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge(tmp_path / "text_encoder", 1_000_000)  # 4 MB as float32
    huge(tmp_path / "vae", 250_000)
    monkeypatch.setattr(resources, "usable_cores", lambda: 8)
    small = (0, True, 1), (9_999_999, True, 1), (10_000_000, True, 2), (10_000_000, False, 8)
    for available, prompts, expected in (*small, (10**9, True, 8), (None, True, 8)):
        monkeypatch.setattr(resources, "available_memory", lambda available=available: available)
        assert resources.encoding_processes(tmp_path, "cpu", prompts) == expected
        assert resources.encoding_processes(tmp_path, "cuda:1", prompts) == 1


def test_little_memory_makes_one_process_and_the_same_latents(
    tmp_path: Path, foundation: str, started: list[int], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """And where the text encoder is a large one, a warning, once."""

    def warnings() -> list[str]:
        found = [message for message in caplog.messages if "torchrun" in message]
        caplog.clear()
        return found

    caplog.set_level(logging.WARNING, "univigu.data.resources")
    monkeypatch.setattr(datamodule, "this_device", lambda: "cpu")
    monkeypatch.setattr(build, "usable_cores", lambda: 2)
    monkeypatch.setattr(resources, "usable_cores", lambda: 2)
    data(foundation, tmp_path / "plenty").prepare_data()
    assert started == [2] and warnings() == []  # the shipped encoder is small
    monkeypatch.setattr(resources, "available_memory", lambda: 1)
    monkeypatch.setattr(resources, "LARGE", 1000)
    data(foundation, tmp_path / "little").prepare_data()
    assert started == [2, 2, 1]  # rendering is as it was
    assert shards(tmp_path / "little") == shards(tmp_path / "plenty")
    (warning,) = warnings()
    assert "tools/encode.py" in warning and "docs/CLUSTER.md" in warning
    for options in ({}, {"precompute": False}):
        data(foundation, tmp_path / "little", **options).prepare_data()
    assert warnings() == []  # there is nothing to encode
    resources.warn_if_slow(foundation, "cuda:0")
    assert warnings() == []
    started.clear()
    arguments = ["--source", str(next((tmp_path / "little").iterdir()) / "val"), "--foundation", foundation]
    assert tool["main"]([*arguments, "--output", str(tmp_path / "made"), "--device", "cpu"]) == 0
    assert started == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows that a GPU is asked for by its absence")
def test_encoding_goes_where_training_goes(tmp_path: Path, foundation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datamodule, "this_device", lambda: "cuda:0")
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda"):
        data(foundation, tmp_path).prepare_data()
    module = data(foundation, tmp_path)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert module._encoding_device() == "cpu"  # a training on the CPU leaves a GPU alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_encodes_in_one_process_that_gives_its_memory_back(
    tmp_path: Path, foundation: str, started: list[int]
) -> None:
    before = torch.cuda.memory_allocated()
    data(foundation, tmp_path).prepare_data()
    assert started[-1] == 1 and torch.cuda.memory_allocated() == before
    manifests = [Manifest.load(path) for path in next(tmp_path.iterdir()).glob("latents-*/*")]
    assert len(manifests) == 3 and all(manifest is not None and manifest.complete for manifest in manifests)


def test_the_documented_commands_parse() -> None:
    text = (REPO / "docs" / "CLUSTER.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"(?:torchrun|srun) .*tools/encode\.py (.*)", text)
    assert len(lines) == 2
    for line in lines:
        options = tool["parser"]().parse_args(shlex.split(line))
        assert (options.height, options.width, options.num_frames) == (480, 832, 81)  # those of the overlays
