"""Writes the embedded world to shards, as real mp4 files with their texts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from univigu.data.build import build_folder
from univigu.data.processes import SpawnPool
from univigu.data.shards import Manifest, ShardInfo, write_shard
from univigu.data.video import encode_mp4
from univigu.shapes import renderer, scenes, texts

ENCODING = b"h264-1"  # change it when encode_mp4 writes other files


@dataclass(frozen=True)
class _Job:
    split: scenes.Split
    seeds: range
    height: int
    width: int
    num_frames: int


@cache
def world_fingerprint() -> str:
    """A short hash of what this version of the world draws and writes: other content, other data folders."""
    digest = hashlib.sha256(ENCODING)
    for seed in range(8):
        scene = scenes.sample_scene(seed)
        digest.update(json.dumps([scene.to_dict(), texts.prompt_of(scene), texts.caption_of(scene)]).encode())
        digest.update(renderer.render(scene).numpy().tobytes())
    return digest.hexdigest()[:8]


def write_shapes(
    folder: str | Path,
    split: scenes.Split,
    num_clips: int,
    first_seed: int = 0,
    shard_size: int = 100,
    height: int = scenes.CANVAS,
    width: int = scenes.CANVAS,
    num_frames: int = scenes.NUM_FRAMES,
    pool: SpawnPool | None = None,
) -> Manifest:
    """Render clips to video shards; complete shards of the folder stay, missing ones are made.

    Args:
        folder: gets the shards and their manifest.
        split: which of the world's splits; see :func:`univigu.shapes.scenes.sample_scene`.
        num_clips: how many clips, at least 1.
        first_seed: seed of the first clip; the following ones count up, and a clip's key is its seed.
        shard_size: clips a shard.
        height, width, num_frames: size of the clips; H.264 wants even pixels.
        pool: renders in other processes; None renders in this one.

    Raises:
        DataError: the folder holds other shards.
        ValueError: an argument out of its range, by name.
    """
    counts = {"num_clips": num_clips, "first_seed": first_seed, "shard_size": shard_size}
    for name, value in counts.items():
        least = 0 if name == "first_seed" else 1
        if value < least:
            raise ValueError(f"{name}={value}: expected at least {least}")
    size = {"height": height, "width": width, "num_frames": num_frames}
    world = {"generator": "shapes", "world": world_fingerprint(), "split": split}
    seeds = range(first_seed, first_seed + num_clips)
    jobs = {
        f"{split}-{number:06d}.tar": _Job(split, seeds[number * shard_size : (number + 1) * shard_size], **size)
        for number in range(-(-num_clips // shard_size))
    }
    manifest = Manifest("video", {**world, **counts, **size})
    return build_folder(Path(folder), manifest, jobs, _write, pool, f"rendering {split} shards")


def _write(path: Path, job: _Job) -> ShardInfo:
    return write_shard(path, (_clip(job, seed) for seed in job.seeds))


def _clip(job: _Job, seed: int) -> tuple[str, dict[str, bytes]]:
    scene = scenes.sample_scene(seed, job.split)
    description = {"prompt": texts.prompt_of(scene), "caption": texts.caption_of(scene), "scene": scene.to_dict()}
    video = encode_mp4(renderer.render(scene, job.height, job.width, job.num_frames), fps=scenes.FPS)
    return f"{seed:08d}", {"mp4": video, "json": json.dumps(description).encode()}
