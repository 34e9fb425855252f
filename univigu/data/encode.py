"""Precomputation: video shards to shards of latents and prompt embeddings, once, so that training runs neither encoder.

What is stored is bit for bit what training would encode itself on the same device (float32): both go through
``univigu.models.encode``, whose results do not depend on the batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from univigu.data.buckets import Bucket, BucketChooser, size_parameters
from univigu.data.build import Share, SpawnPool, build_folder
from univigu.data.index import SampleRef, Scan, list_shards, scan_shard, walk_files
from univigu.data.sample import (
    LATENTS_SUFFIX,
    PROMPT_SUFFIX,
    TEXT_SUFFIX,
    DataError,
    Sample,
    SampleError,
    without_traceback,
)
from univigu.data.shards import Manifest, ShardInfo, write_shard
from univigu.data.video import VideoError, read_video, to_model_range
from univigu.models.fingerprint import folder_fingerprint

LatentDtype = Literal["float32", "bfloat16", "float16"]
ROWS = 500  # samples of a list or a folder of files that go to one shard
MAX_PROMPT = 512
"""Tokens that Wan's text encoder is given at most; longer prompts are left out."""


@dataclass(frozen=True)
class _Job:
    source: str
    foundation: str
    prompts: bool
    dtype: LatentDtype
    device: str
    buckets: tuple[Bucket, ...]
    strict: bool
    part: Scan | None = field(default=None, compare=False)
    """Some of the source's samples, and what is wrong with others; None takes all."""


def vae_parameters(foundation_path: str | Path) -> dict[str, Any]:
    """What identifies the latents a foundation's VAE makes: its fingerprint and how they are normalised.

    Raises:
        DataError: the folder holds no VAE.
    """
    folder = Path(foundation_path) / "vae"
    try:
        config = json.loads((folder / "config.json").read_text())
        normalization = {"mean": config["latents_mean"], "std": config["latents_std"], "of": "mode"}
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"foundation={str(foundation_path)!r}: no readable vae/config.json ({error!r})") from error
    return {"vae": folder_fingerprint(folder), "normalization": normalization}


def prompt_parameters(foundation_path: str | Path) -> dict[str, Any]:
    """What identifies the prompt embeddings a foundation makes: the fingerprints of text encoder and tokenizer.

    Raises:
        DataError: the folder lacks one of them.
    """
    for name in ("text_encoder", "tokenizer"):
        if not (Path(foundation_path) / name).is_dir():
            raise DataError(f"foundation={str(foundation_path)!r}: it holds no {name} folder")
    return {name: folder_fingerprint(Path(foundation_path) / name) for name in ("text_encoder", "tokenizer")}


def encode_shards(
    source: str | Path,
    target: str | Path,
    foundation_path: str | Path,
    dtype: LatentDtype = "float32",
    workers: int | None = None,
    buckets: Sequence[Bucket] = (Bucket(64, 64, 9),),
    strict: bool = False,
    pool: SpawnPool | None = None,
    prompts: bool = True,
    device: str = "cpu",
    share: Share = Share(),  # noqa: B008
) -> Manifest:
    """Encode every shard of a folder; a folder that is already whole is left alone, a half-written one completed.

    Args:
        source: folder of video shards.
        target: where the encoded shards go, one for each of the source, with the same names, keys and texts.
        foundation_path: WanPipeline folder whose VAE and text encoder are used.
        dtype: how latents and embeddings are stored; they are computed in float32.
        workers: processes; None takes one for every usable core.  On another device than the CPU this one works, if
            there is no ``pool``.
        buckets: what videos are brought to, each to the one that fits it best; see :mod:`univigu.data.buckets`.
        strict: raise for the first sample that cannot be encoded instead of noting it in the manifest.
        pool: processes to use instead of new ones.
        prompts: whether to store the prompts' embeddings too.
        device: where the encoders run.
        share: which of several such runs this one is; each encodes its part of the shards.

    Returns:
        the manifest; ``skipped`` of its shards tells which samples are missing and why.

    Raises:
        DataError: the source holds no shard, or the target holds latents of something else.
        SampleError: in strict mode, naming shard and key.
    """
    source, target = Path(source), Path(target)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r}: expected 'float32', 'bfloat16' or 'float16'")
    shards = list_shards(source)
    parameters = {**vae_parameters(foundation_path), "dtype": dtype, "source": source_parameters(source)}
    parameters |= size_parameters(buckets)
    if prompts:
        parameters |= prompt_parameters(foundation_path)
    place = str(foundation_path)
    sizes = tuple(buckets)
    jobs = {
        name: _Job(str(path), place, prompts, dtype, device, sizes, strict, part)
        for path in shards
        for name, part in _outputs(path)
    }
    manifest = Manifest("latents", parameters)
    with SpawnPool(workers) as own:
        processes = pool or (own if device == "cpu" else None)
        return build_folder(target, manifest, jobs, _write, processes, f"encoding {source.name} shards", share)


def source_parameters(source: Path) -> list[list[Any]]:
    """[name, bytes, sha256] of every shard; the checksum is the manifest's, None without a manifest."""
    manifest = Manifest.load(source)
    known = {shard.name: shard for shard in manifest.shards} if manifest else {}
    rows: list[list[Any]] = []
    for path in list_shards(source):
        size, info = _size(path), known.get(path.name)
        rows.append([path.name, size, info.sha256 if info and info.num_bytes == size else None])
    return rows


def _size(path: Path) -> int:
    """Bytes of a shard, or of all files of a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in walk_files(path))


def _outputs(path: Path) -> Iterator[tuple[str, Scan | None]]:
    """Names of the shards that are made of one of the source's, and which of its samples go there."""
    if path.suffix == ".tar" and path.is_file():
        yield path.name, None
        return
    (refs, errors), name = scan_shard(path), path.name if path.is_file() else "files"
    for number, start in enumerate(range(0, max(1, len(refs)), ROWS)):
        yield f"{name}-{number:06d}.tar", (refs[start : start + ROWS], [] if start else errors)


# --------------------------------------------------------------- in a worker


@lru_cache(maxsize=1)
def _foundation(path: str) -> Any:
    from univigu.models.foundation import Foundation

    return Foundation(path)


def _write(path: Path, job: _Job) -> ShardInfo:
    refs, errors = job.part or scan_shard(job.source)
    if errors and job.strict:
        raise errors[0]
    info = write_shard(path, _encoded(refs, job, errors))
    info.skipped = [{"reason": e.reason, "key": e.key, "field": e.field, "value": e.value} for e in errors]
    return info


def _encoded(refs: list[SampleRef], job: _Job, errors: list[SampleError]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    from univigu.models.encode import group_size

    choose = BucketChooser(job.buckets)
    waiting: dict[int, list[tuple[SampleRef, dict[str, bytes], torch.Tensor]]] = {}  # clips of a size, not yet enough
    for ref in refs:
        try:
            number = choose(ref)
            bucket = job.buckets[number]
            sample, frames = decode_sample(ref, bucket.num_frames, bucket.height, bucket.width)
            waiting.setdefault(number, []).append((ref, _texts(sample, ref, job), frames))
        except SampleError as error:
            if job.strict:
                raise
            errors.append(without_traceback(error))
            continue
        if len(waiting[number]) == group_size(bucket.num_frames, bucket.height, bucket.width):
            yield from _with_latents(waiting.pop(number), job)
    for samples in waiting.values():
        yield from _with_latents(samples, job)


def _with_latents(
    samples: list[tuple[SampleRef, dict[str, bytes], torch.Tensor]], job: _Job
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Keys and members of samples whose clips are encoded together."""
    from univigu.models.encode import encode_clips

    vae, clips = _foundation(job.foundation).to(job.device).vae, torch.stack([frames for _, _, frames in samples])
    with torch.inference_mode():
        latents = encode_clips(vae, to_model_range(clips.to(job.device)))
    for (ref, texts, _), of_clip in zip(samples, latents, strict=True):
        yield ref.key, {LATENTS_SUFFIX: _packed(job, latents=of_clip), **texts}


def _packed(job: _Job, **tensors: torch.Tensor) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.to("cpu", getattr(torch, job.dtype)).contiguous() for name, tensor in tensors.items()})


def _texts(sample: Sample, ref: SampleRef, job: _Job) -> dict[str, bytes]:
    """A sample's members that hold its texts: the prompt's embeddings, if they are asked for, and the texts."""
    from univigu.models.tokens import TextTooLongError

    members = {}
    if job.prompts:
        try:
            embeds = _prompt_embeds(sample.texts.prompt, job)
        except TextTooLongError as error:
            raise SampleError("text_over_slot", sample.shard, sample.key, "prompt", str(error)) from error
        members[PROMPT_SUFFIX] = _packed(job, prompt=embeds, null=_null_embeds(job))
    texts = ref.read(TEXT_SUFFIX)
    assert texts is not None  # decode_sample has parsed it
    return {**members, TEXT_SUFFIX: texts}


def _prompt_embeds(prompt: str, job: _Job) -> torch.Tensor:
    """Embeddings [S, text_dim] of a prompt, as many as it has tokens."""
    from univigu.models.encode import encode_prompts
    from univigu.models.tokens import tokenize

    foundation = _foundation(job.foundation)
    ids = tokenize(foundation.tokenizer, [prompt], MAX_PROMPT)
    ids = ids[:, : int((ids != foundation.pad_token_id).sum())].to(job.device)
    with torch.inference_mode():
        return encode_prompts(foundation.text_encoder.to(job.device), ids, foundation.pad_token_id)[0]


@lru_cache(maxsize=1)
def _null_embeds(job: _Job) -> torch.Tensor:
    """The empty prompt's embeddings [S, text_dim], which stand in where a prompt is dropped."""
    return _prompt_embeds("", job)


def decode_sample(ref: SampleRef, num_frames: int, height: int, width: int) -> tuple[Sample, torch.Tensor]:
    """A sample whose texts have been found sound, and its frames uint8 [F, C, H, W].

    Raises:
        SampleError: the sample is not sound, or its video cannot be read.
    """
    sample = ref.load()
    if sample.video is None:
        raise SampleError("missing_field", ref.shard, ref.key, "video", "the sample holds latents")
    return sample, decode_video(sample.video, ref, num_frames, height, width)


def decode_video(video: bytes, ref: SampleRef, num_frames: int, height: int, width: int) -> torch.Tensor:
    """:func:`univigu.data.video.read_video` of a sample's bytes, with its errors as SampleError."""
    try:
        return read_video(video, num_frames, height, width)
    except VideoError as error:
        raise SampleError("unreadable_video", ref.shard, ref.key, "video", str(error)) from error
