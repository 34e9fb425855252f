"""A tiny embedded world, rendered and encoded once, and a way to make shards with faults."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule

from univigu.data import datamodule
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.processes import SpawnPool
from univigu.data.video import encode_mp4
from univigu.shapes import renderer, scenes, texts

SIZES = {"num_train_clips": 13, "num_val_clips": 5}


@pytest.fixture(scope="session", autouse=True)
def one_pool(pool: SpawnPool) -> Iterator[None]:
    """Data modules of this folder's tests take the session's processes instead of starting their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datamodule, "SpawnPool", lambda workers=None: nullcontext(pool))
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, foundation: str, one_pool: None) -> dict[str, Any]:
    """Arguments of a data module whose data have been prepared."""
    root = str(tmp_path_factory.mktemp("world"))
    arguments: dict[str, Any] = {"foundation": foundation, "root": root, "batch_size": 2, "prompt_length": 64, **SIZES}
    VideoTextDataModule(**arguments).prepare_data()
    return {**arguments, "num_workers": 0}


def clip(seed: int) -> dict[str, bytes]:
    """The members of a sound sample."""
    scene = scenes.sample_scene(seed)
    description = {"prompt": texts.prompt_of(scene), "caption": texts.caption_of(scene), "scene": scene.to_dict()}
    return {"mp4": encode_mp4(renderer.render(scene)), "json": json.dumps(description).encode()}


@pytest.fixture(scope="session")
def clips() -> list[dict[str, bytes]]:
    return [clip(seed) for seed in range(6)]


@pytest.fixture
def raw_tar() -> Callable[..., Path]:
    """Writes a tar file of any members, without the checks that the package's writer makes."""

    def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
        return path

    return write


@pytest.fixture
def faulty(tmp_path: Path, clips: list[dict[str, bytes]], raw_tar: Callable[..., Path]) -> Path:
    """A folder with every kind of damage; the sound samples are good0 ... good4."""
    good = json.loads(clips[0]["json"])
    video, text = clips[0]["mp4"], clips[0]["json"]
    folder = tmp_path / "faulty" / "train"
    bad: dict[str, tuple[bytes | None, bytes | None]] = {
        "text-video": (b"this is not a video, however long it may be" * 20, text),
        "empty-video": (b"", text),
        "cut-video": (video[: len(video) // 3], text),
        "no-video": (None, text),
        "no-json": (video, None),
        "json-cut": (video, text[:40]),
        "json-list": (video, b"[1, 2]"),
        "json-latin": (video, b'{"prompt": "\xe9"}'),
        "no-caption": (video, json.dumps({"prompt": "a"}).encode()),
        "number-prompt": (video, json.dumps({**good, "prompt": 3}).encode()),
        "null-caption": (video, json.dumps({**good, "caption": None}).encode()),
        "dict-qa": (video, json.dumps({**good, "qa": {"question": "?"}}).encode()),
    }
    members = []
    for number, (key, (mp4, member)) in enumerate(bad.items()):
        if number < 3:  # sound ones between the bad ones
            members += [(f"good{number}.{suffix}", data) for suffix, data in clips[number].items()]
        members += [(f"{key}.{suffix}", data) for suffix, data in (("mp4", mp4), ("json", member)) if data is not None]
    raw_tar(folder / "a.tar", members)
    (folder / "b-empty.tar").write_bytes(b"")
    (folder / "c-text.tar").write_bytes(b"no tar file " * 1000)
    whole = raw_tar(folder / "d-cut.tar", [(f"good3.{s}", d) for s, d in clips[3].items()] + [("cut.mp4", video)])
    size = whole.read_bytes().index(b"cut.mp4") + 512 + len(video) // 2
    whole.write_bytes(whole.read_bytes()[:size])
    twice = [(f"good4.{s}", d) for s, d in clips[4].items()] + [("twice.mp4", video), ("twice.json", text)] * 2
    raw_tar(folder / "e-twice.tar", twice)
    return folder.parent


class Recorder(LightningModule):
    """Learns nothing and notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        assert "latents" in batch
        self.seen.append(batch["key"])
        return self.weight * batch["latents"].mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val", float(len(batch["key"])), batch_size=len(batch["key"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="session")
def recorder() -> type[Recorder]:
    """A module that trains on the data and keeps the keys it saw in ``seen``."""
    return Recorder


FAULTS = {
    "unreadable_video": 3,
    "missing_field": 3,
    "corrupt_json": 2,
    "wrong_type": 4,
    "damaged_shard": 3,
    "duplicate_member": 1,
}


@pytest.fixture(scope="session")
def faults() -> dict[str, int]:
    """What is wrong with the ``faulty`` folder, by reason."""
    return dict(FAULTS)


def ranked(module: VideoTextDataModule, world_size: int) -> list[Any]:
    """The training loaders of all ranks."""
    loaders = []
    for rank in range(world_size):
        module._ranks = lambda rank=rank: {"rank": rank, "world_size": world_size}  # type: ignore[method-assign, misc]
        loaders.append(module.train_dataloader())
    return loaders
