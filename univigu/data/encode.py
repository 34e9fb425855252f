"""Precomputation: video shards to shards of normalised latents, once, so that training never runs the VAE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from univigu.data.build import SpawnPool, build_folder
from univigu.data.sample import LATENTS_SUFFIX, TEXT_SUFFIX, DataError, SampleError, parse_sample
from univigu.data.shards import Manifest, SampleRef, ShardInfo, list_shards, scan_shard, write_shard
from univigu.data.video import VideoError, read_video, to_model_range

LatentDtype = Literal["float32", "bfloat16", "float16"]
BATCH_SIZE = 16


@dataclass(frozen=True)
class _Job:
    source: str
    vae: str
    dtype: LatentDtype
    height: int
    width: int
    num_frames: int
    strict: bool


def vae_parameters(foundation_path: str | Path) -> dict[str, Any]:
    """What identifies the latents a foundation's VAE makes: its fingerprint and how they are normalised.

    Raises:
        DataError: the folder holds no VAE.
    """
    from univigu.models.foundation import component_fingerprint

    folder = Path(foundation_path) / "vae"
    try:
        config = json.loads((folder / "config.json").read_text())
        normalization = {"mean": config["latents_mean"], "std": config["latents_std"], "of": "mode"}
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"foundation={str(foundation_path)!r}: no readable vae/config.json ({error!r})") from error
    return {"vae": component_fingerprint(folder), "normalization": normalization}


def encode_shards(
    source: str | Path,
    target: str | Path,
    foundation_path: str | Path,
    dtype: LatentDtype = "float32",
    workers: int | None = None,
    height: int = 64,
    width: int = 64,
    num_frames: int = 9,
    strict: bool = False,
    pool: SpawnPool | None = None,
) -> Manifest:
    """Encode a folder of video shards, shard by shard; what is already encoded stays.

    The latents are the posterior's mode, normalised as the transformer wants them; the json members are kept as
    they are.  Samples that cannot be encoded are left out and counted in the manifest by reason.

    Args:
        source: folder of video shards.
        target: where the latent shards and their manifest go, under the same file names.
        foundation_path: WanPipeline folder whose ``vae/`` encodes.
        dtype: how the latents are stored.
        workers: processes of one thread each; None takes one for every usable core.
        height, width, num_frames: size that the videos are brought to.
        strict: raise on the first sample that cannot be encoded.
        pool: processes to use instead of new ones.

    Raises:
        DataError: the source holds no shard, or the target holds latents of something else.
        SampleError: in strict mode, naming shard and key.
    """
    source, target = Path(source), Path(target)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r}: expected 'float32', 'bfloat16' or 'float16'")
    shards = list_shards(source)
    size = {"height": height, "width": width, "num_frames": num_frames}
    parameters = {**vae_parameters(foundation_path), "dtype": dtype, **size, "source": source_parameters(source)}
    vae = str(Path(foundation_path) / "vae")
    jobs = {path.name: _Job(str(path), vae, dtype, height, width, num_frames, strict) for path in shards}
    manifest = Manifest("latents", parameters)
    with SpawnPool(workers) as own:
        return build_folder(target, manifest, jobs, _write, pool or own, f"encoding {source.name} shards")


def source_parameters(source: Path) -> list[list[Any]]:
    """[name, bytes, sha256] of every shard; the checksum is the manifest's, None without a manifest."""
    manifest = Manifest.load(source)
    known = {shard.name: shard for shard in manifest.shards} if manifest else {}
    rows: list[list[Any]] = []
    for path in list_shards(source):
        size, info = path.stat().st_size, known.get(path.name)
        rows.append([path.name, size, info.sha256 if info and info.num_bytes == size else None])
    return rows


# --------------------------------------------------------------- in a worker


@lru_cache(maxsize=1)
def _vae(folder: str) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False).eval()


def _write(path: Path, job: _Job) -> ShardInfo:
    refs, errors = scan_shard(job.source)
    if errors and job.strict:
        raise errors[0]
    info = write_shard(path, _encoded(refs, job, errors))
    info.skipped = [{"reason": e.reason, "key": e.key, "field": e.field, "value": e.value} for e in errors]
    return info


def _encoded(refs: list[SampleRef], job: _Job, errors: list[SampleError]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    from safetensors.torch import save

    from univigu.models.foundation import encode_video

    dtype = getattr(torch, job.dtype)
    for start in range(0, len(refs), BATCH_SIZE):
        ready: list[tuple[SampleRef, torch.Tensor]] = []
        for ref in refs[start : start + BATCH_SIZE]:
            try:
                ready.append((ref, decode_sample(ref, job.num_frames, job.height, job.width)))
            except SampleError as error:
                if job.strict:
                    raise
                errors.append(error)
        if not ready:
            continue
        with torch.inference_mode():
            batch = encode_video(_vae(job.vae), to_model_range(torch.stack([frames for _, frames in ready])))
        for (ref, _), latents in zip(ready, batch.to(dtype), strict=True):
            texts = ref.read(TEXT_SUFFIX)
            assert texts is not None  # decode_sample has parsed it
            # numpy-free, and without tensors that share memory: one contiguous tensor a file
            yield ref.key, {LATENTS_SUFFIX: save({"latents": latents.clone().contiguous()}), TEXT_SUFFIX: texts}


def decode_sample(ref: SampleRef, num_frames: int, height: int, width: int) -> torch.Tensor:
    """A sample's frames uint8 [F, C, H, W], once its texts have been found sound.

    Raises:
        SampleError: the sample is not sound, or its video cannot be read.
    """
    sample = parse_sample(ref.read_all(), ref.shard, ref.key)
    if sample.video is None:
        raise SampleError("missing_field", ref.shard, ref.key, "video", "the sample holds latents")
    return decode_video(sample.video, ref, num_frames, height, width)


def decode_video(video: bytes, ref: SampleRef, num_frames: int, height: int, width: int) -> torch.Tensor:
    """:func:`univigu.data.video.read_video` of a sample's bytes, with its errors as SampleError."""
    try:
        return read_video(video, num_frames, height, width)
    except VideoError as error:
        raise SampleError("unreadable_video", ref.shard, ref.key, "video", str(error)) from error
