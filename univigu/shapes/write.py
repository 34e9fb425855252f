"""Writes the embedded world to shards, as real mp4 files with their texts."""

from __future__ import annotations

import hashlib
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

from univigu.data.shards import Engine, Manifest, ShardInfo, build_folder, write_shard
from univigu.data.video import encode_mp4
from univigu.shapes import renderer, scenes, texts

ENCODING = b"h264-1"  # change it when other pixels are read from what encode_mp4 writes


@cache
def world_fingerprint() -> str:
    """A short hash of what this version of the world draws and writes: other content, other data folders."""
    digest = hashlib.sha256(ENCODING)
    for seed in range(8):
        scene = scenes.sample_scene(seed)
        digest.update(json.dumps(_described(scene)).encode())
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
    engine: Engine = map,
) -> Manifest:
    """Render clips to video shards, wherever the engine does; complete shards of the folder stay.

    The seeds count up from ``first_seed``, and a clip's key is its seed. Height and width are even.
    """
    if num_clips < 1:
        raise ValueError(f"num_clips={num_clips}: expected at least 1")
    size = {"height": height, "width": width, "num_frames": num_frames}
    world: dict[str, Any] = {"generator": "shapes", "world": world_fingerprint(), "split": split}
    world |= {"num_clips": num_clips, "first_seed": first_seed, "shard_size": shard_size, **size}
    seeds = range(first_seed, first_seed + num_clips)
    parts = [seeds[start : start + shard_size] for start in range(0, num_clips, shard_size)]
    jobs = {f"{split}-{number:06d}.tar": part for number, part in enumerate(parts)}
    work = partial(_write, split, size)
    return build_folder(Path(folder), Manifest("video", world), jobs, work, engine)


def _write(split: scenes.Split, size: dict[str, int], path: Path, seeds: range) -> ShardInfo:
    def members(scene: scenes.Scene) -> dict[str, bytes]:
        video = encode_mp4(renderer.render(scene, **size), fps=scenes.FPS)
        return {"mp4": video, "json": json.dumps(_described(scene)).encode()}

    return write_shard(path, ((f"{seed:08d}", members(scenes.sample_scene(seed, split))) for seed in seeds))


def _described(scene: scenes.Scene) -> dict[str, Any]:
    """The json member of a clip."""
    described = {"prompt": texts.prompt_of(scene), "caption": texts.caption_of(scene), "scene": scene.to_dict()}
    return {**described, "qa": texts.questions_of(scene)}
