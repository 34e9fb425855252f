"""A tiny embedded world, rendered and encoded once, and a way to make shards with faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.damage import good_sample, write_raw
from univigu.data.datamodule import VideoTextDataModule

SIZES = {"num_train_clips": 13, "num_val_clips": 5}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, foundation: str) -> dict[str, Any]:
    """Arguments of a data module whose data have been prepared."""
    root = str(tmp_path_factory.mktemp("world"))
    arguments: dict[str, Any] = {"foundation": foundation, "root": root, "batch_size": 2, "prompt_length": 64, **SIZES}
    VideoTextDataModule(**arguments).prepare_data()
    return {**arguments, "num_workers": 0}


@pytest.fixture(scope="session")
def clips() -> list[dict[str, bytes]]:
    return [good_sample(seed) for seed in range(6)]


@pytest.fixture
def faulty(tmp_path: Path, clips: list[dict[str, bytes]]) -> Path:
    """A folder with every kind of damage (FAULTS); the sound samples are good0 ... good4."""
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
    samples = [(f"good{number}", clips[number]) for number in range(3)]
    for key, members in bad.items():
        found = {suffix: data for suffix, data in zip(("mp4", "json"), members, strict=True) if data is not None}
        samples.insert(len(samples) // 2, (key, found))
    write_raw(folder / "a.tar", samples)
    (folder / "b-empty.tar").write_bytes(b"")
    (folder / "c-text.tar").write_bytes(b"no tar file " * 1000)
    write_raw(folder / "d-cut.tar", [("good3", clips[3]), ("cut", {"mp4": video})])
    whole = (folder / "d-cut.tar").read_bytes()
    (folder / "d-cut.tar").write_bytes(whole[: whole.index(b"cut.mp4") + 512 + len(video) // 2])
    write_raw(folder / "e-twice.tar", [("good4", clips[4]), ("twice", clips[0]), ("twice", clips[0])])
    return folder.parent


FAULTS = {
    "unreadable_video": 3,
    "missing_field": 3,
    "corrupt_json": 2,
    "wrong_type": 4,
    "damaged_shard": 3,
    "duplicate_member": 1,
}
"""What is wrong with the ``faulty`` folder, by reason."""


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


def fit(data: VideoTextDataModule, folder: Path, steps: int, ckpt: Path | None = None, **options: Any) -> Recorder:
    """Trains, with a checkpoint after every step; the recorder has the keys of the batches."""
    model = Recorder()
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[checkpoint, *options.pop("callbacks", [])],
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"logger": False, "limit_val_batches": 0, **options},
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt)
    return model


def ranked(module: VideoTextDataModule, world_size: int) -> list[Any]:
    """The training loaders of all ranks."""
    loaders = []
    for rank in range(world_size):
        module._ranks = lambda rank=rank: {"rank": rank, "world_size": world_size}  # type: ignore[method-assign, misc]
        loaders.append(module.train_dataloader())
    return loaders
