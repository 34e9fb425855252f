"""Writes the embedded world to shards, as real mp4 files with their texts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from univigu.data.build import SpawnPool, build_folder
from univigu.data.shards import Manifest, ShardInfo, write_shard
from univigu.data.video import encode_mp4
from univigu.shapes import renderer, scenes, texts

ENCODING = b"h264-1"  # change it when encode_mp4 writes other files


@dataclass(frozen=True)
class _Job:
    split: scenes.Split
    first_seed: int
    num_clips: int
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
    workers: int | None = None,
    height: int = scenes.CANVAS,
    width: int = scenes.CANVAS,
    num_frames: int = scenes.NUM_FRAMES,
    pool: SpawnPool | None = None,
) -> Manifest:
    """Render clips to video shards; a folder that is already whole is left alone, a half-written one completed.

    Args:
        folder: where the shards and their manifest go.
        split: which of the world's streams; see :func:`univigu.shapes.scenes.sample_scene`.
        num_clips: how many clips, at least 1.
        first_seed: seed of the first clip; the following ones count up, and a clip's key is its seed.
        shard_size: clips a shard.
        workers: processes; None takes one for every usable core.
        height, width, num_frames: size of the clips; H.264 wants even pixels.
        pool: processes to use instead of new ones.

    Raises:
        DataError: the folder holds other shards.
        ValueError: an argument out of its range, by name.
    """
    least = {"num_clips": 1, "first_seed": 0, "shard_size": 1}
    for name, value in {"num_clips": num_clips, "first_seed": first_seed, "shard_size": shard_size}.items():
        if value < least[name]:
            raise ValueError(f"{name}={value}: expected at least {least[name]}")
    parameters = {
        "generator": "shapes", "world": world_fingerprint(), "split": split, "num_clips": num_clips,
        "first_seed": first_seed, "shard_size": shard_size, "height": height, "width": width, "num_frames": num_frames,
    }  # fmt: skip
    jobs = {}
    for number, start in enumerate(range(0, num_clips, shard_size)):
        count = min(shard_size, num_clips - start)
        jobs[f"{split}-{number:06d}.tar"] = _Job(split, first_seed + start, count, height, width, num_frames)
    with SpawnPool(workers) as own:
        manifest = Manifest("video", parameters)
        return build_folder(Path(folder), manifest, jobs, _write, pool or own, f"rendering {split} shards")


def _write(path: Path, job: _Job) -> ShardInfo:
    return write_shard(path, (_clip(job, job.first_seed + i) for i in range(job.num_clips)))


def _clip(job: _Job, seed: int) -> tuple[str, dict[str, bytes]]:
    scene = scenes.sample_scene(seed, job.split)
    description = {"prompt": texts.prompt_of(scene), "caption": texts.caption_of(scene), "scene": scene.to_dict()}
    video = encode_mp4(renderer.render(scene, job.height, job.width, job.num_frames), fps=scenes.FPS)
    return f"{seed:08d}", {"mp4": video, "json": json.dumps(description).encode()}
