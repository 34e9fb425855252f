"""Jobs that Ray's processes do in tests. They import this file, which imports little: each process starts anew."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

from univigu.data.shards import ShardInfo, write_shard
from univigu.data.video import encode_mp4


def die_once(mark: Path) -> None:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Renderer:
    """A model of which each process loads its own, and whose process is killed once where there are marks."""

    def __init__(self, marks: Path | None) -> None:
        self.marks = marks

    @cached_property
    def palette(self) -> torch.Tensor:
        return torch.rand(256, 3, generator=torch.Generator().manual_seed(0))

    def frames(self, seed: int) -> torch.Tensor:
        if self.marks is not None:
            die_once(self.marks / "actor")
        numbers = torch.randint(256, (5, 16, 16), generator=torch.Generator().manual_seed(seed))
        return (255 * self.palette[numbers]).to(torch.uint8).permute(0, 3, 1, 2)


class Render:
    """Writes a shard of one clip; it is killed twice where there are marks, each time within a shard."""

    def __init__(self, marks: Path | None = None) -> None:
        self.renderer, self.marks = Renderer(marks), marks

    def __call__(self, path: Path, seed: int) -> ShardInfo:
        return write_shard(path, self.samples(seed))

    def samples(self, seed: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        video = encode_mp4(self.renderer.frames(seed))
        yield f"{seed:08d}-a", {"mp4": video}
        for number in range(2) if self.marks is not None else ():
            die_once(self.marks / f"task{number}")
        yield f"{seed:08d}-b", {"mp4": video}


class Gpu:
    """Says which GPU it has, when a file exists."""

    def number(self, mark: Path) -> str:
        for _ in range(3000):
            if mark.exists():
                break
            time.sleep(0.02)
        return os.environ["CUDA_VISIBLE_DEVICES"] if mark.exists() else "none"


class TwoModels:
    """Writes which GPU its models have; no job's second model ends before the other job's first one has begun."""

    def __init__(self, marks: Path) -> None:
        self.first, self.second, self.marks = Gpu(), Gpu(), marks

    def __call__(self, path: Path, job: int) -> ShardInfo:
        (self.marks / f"{job}").touch()
        numbers = [model.number(self.marks / f"{1 - job}") for model in (self.first, self.second)]
        return write_shard(path, [(f"{job}-{'-'.join(numbers)}", {"txt": b""})])
