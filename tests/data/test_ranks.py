"""Many shards among ranks and workers: every sample exactly once an epoch, after a resume, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import ranked
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.processes import SpawnPool
from univigu.shapes.write import write_shapes

SHARDS, SAMPLES, BATCH = 64, 192, 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, pool: SpawnPool) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", SAMPLES), ("val", 3)):
        write_shapes(folder / split, split, count, shard_size=SAMPLES // SHARDS, pool=pool)  # type: ignore[arg-type]
    assert len(list((folder / "train").glob("*.tar"))) == SHARDS
    return folder


def loaders(shards: Path, world_size: int, workers: int) -> list[Any]:
    """The training loaders of all ranks."""
    module = VideoTextDataModule(
        shards=str(shards), batch_size=BATCH, num_workers=workers, prompt_length=32, precompute=False
    )
    module.setup("fit")
    return ranked(module, world_size)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 2)])  # 3 does not divide the 64 shards
def test_every_sample_comes_once_an_epoch(shards: Path, world_size: int, workers: int) -> None:
    stop, expected, rest = 7, [], []
    for loader, resumed in zip(loaders(shards, world_size, workers), loaders(shards, world_size, 0), strict=True):
        batches = []
        for number, batch in enumerate(loader, 1):
            batches.append(batch["key"])
            if number == stop:
                resumed.load_state_dict(loader.state_dict())
        assert len(batches) == SAMPLES // (BATCH * world_size)
        expected.append(batches)
        left = len(batches) - stop  # what it goes on with after that is the next epoch
        rest.append([batch["key"] for _, batch in zip(range(left), resumed, strict=False)])
    keys = [key for batches in expected for batch in batches for key in batch]
    assert len(keys) == len(set(keys)) == SAMPLES
    assert rest == [batches[stop:] for batches in expected]
