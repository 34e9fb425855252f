"""Shared memory is used again when nobody holds it, and never before."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from univigu.data.datamodule import VideoTextDataModule
from univigu.data.loader import TrainLoader
from univigu.data.rooms import FREE, SharedRooms


@pytest.fixture(scope="module")
def loader(world: dict[str, Any]) -> TrainLoader:
    module = VideoTextDataModule(**{**world, "precompute": False, "num_workers": 1, "batch_size": 1})
    module.setup("fit")
    return module.train_dataloader()


def states(loader: TrainLoader) -> list[int]:
    rooms = loader._rooms
    assert isinstance(rooms, SharedRooms)
    return list(rooms._states)


def fds(tensor: torch.Tensor) -> int:
    """The memory a tensor lies in, by its file."""
    fd, _ = tensor.untyped_storage()._share_fd_cpu_()
    return os.fstat(fd).st_ino


def test_batches_that_are_held_keep_their_frames(loader: TrainLoader, world: dict[str, Any]) -> None:
    held = [batch for _ in range(2) for batch in loader]  # more than there are rooms
    module = VideoTextDataModule(**{**world, "precompute": False, "batch_size": 1})
    module.setup("fit")
    alone = module.train_dataloader()
    expected = [batch for _ in range(2) for batch in alone]
    assert len(held) == 26
    for ours, theirs in zip(held, expected, strict=True):
        assert ours["key"] == theirs["key"] and torch.equal(ours["video"], theirs["video"])
    assert len({fds(batch["video"]) for batch in held}) == 26


def test_memory_is_used_again(loader: TrainLoader) -> None:
    files = [fds(batch["video"]) for _ in range(3) for batch in loader]
    assert len(files) == 39 and len(set(files)) <= 5


def test_a_view_keeps_its_room(loader: TrainLoader) -> None:
    views = [batch["video"][0, 3] for batch in loader]
    copies = [view.clone() for view in views]
    for _ in range(2):
        for _batch in loader:
            pass
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))


def test_batches_that_are_thrown_away_free_their_rooms(loader: TrainLoader) -> None:
    for _ in range(8):  # as validation does with limit_val_batches: some are fetched ahead and never seen
        iterator = iter(loader)
        next(iterator)
        del iterator
    files = [fds(batch["video"]) for batch in loader]
    assert len(set(files)) <= 5
    assert states(loader).count(FREE) >= 4


def test_latents_lie_in_rooms_too(world: dict[str, Any]) -> None:
    loaders = []
    for workers in (0, 1):
        module = VideoTextDataModule(**{**world, "num_workers": workers})
        module.setup("fit")
        loaders.append(module.train_dataloader())
    assert loaders[0]._rooms is None
    held = [batch for _ in range(2) for batch in loaders[1]]
    for ours, theirs in zip(held, [batch for _ in range(2) for batch in loaders[0]], strict=True):
        assert ours["key"] == theirs["key"]
        for name in ("latents", "prompt_ids", "caption_ids", "prompt_embeds", "null_embeds"):
            assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
    del held, ours
    assert len({fds(batch["latents"]) for _ in range(3) for batch in loaders[1]}) <= 5
