"""Precomputation: video shards to shards of latents and prompt embeddings, so that training runs neither encoder.

On the same device the stored float32 values are bit for bit those that training would compute: both use
``univigu.models.encode``, whose results do not depend on the batch.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from univigu.data.buckets import Bucket, BucketChooser, size_parameters
from univigu.data.build import build_folder
from univigu.data.index import SampleRef, Scan, list_shards, scan_shard, walk_files
from univigu.data.options import check_dtype
from univigu.data.processes import ONLY, Share, SpawnPool
from univigu.data.sample import (
    LATENTS_SUFFIX,
    PROMPT_SUFFIX,
    TEXT_SUFFIX,
    DataError,
    SampleError,
    without_traceback,
)
from univigu.data.shards import Manifest, ShardInfo, write_shard
from univigu.data.video import VideoError, read_video, to_model_range
from univigu.models.fingerprint import folder_fingerprint

LatentDtype = Literal["float32", "bfloat16", "float16"]
SAMPLES_PER_SHARD = 500
"""Samples of a shard that is made from a list or a folder of files."""
MAX_PROMPT = 512
"""Most tokens of Wan's text encoder; samples with longer prompts are left out."""


def vae_parameters(foundation_path: str | Path) -> dict[str, Any]:
    """What identifies the latents of a foundation's VAE: its fingerprint and their normalisation.

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
    """What identifies a foundation's prompt embeddings: the fingerprints of text encoder and tokenizer.

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
    buckets: Sequence[Bucket] = (Bucket(64, 64, 9),),
    strict: bool = False,
    pool: SpawnPool | None = None,
    prompts: bool = True,
    device: str = "cpu",
    share: Share = ONLY,
) -> Manifest:
    """Encode every shard of a folder; complete shards of the target stay, missing ones are made.

    Args:
        source: folder of video shards.
        target: folder of the encoded shards, one for each of the source, with the same names, keys and texts.
        foundation_path: WanPipeline folder whose VAE and text encoder are used.
        dtype: storage type of latents and embeddings; they are computed in float32.
        buckets: sizes of the clips; each clip gets the one that fits it best, see :mod:`univigu.data.buckets`.
        strict: raise for the first sample that cannot be encoded instead of noting it in the manifest.
        pool: encodes in other processes; None encodes in this one.
        prompts: whether to store the prompts' embeddings too.
        device: where the encoders run.
        share: which of several such runs this one is; each encodes its part of the shards.

    Returns:
        the manifest; ``skipped`` of its shards tells which samples are missing and why.

    Raises:
        DataError: the source holds no shard, or the target holds latents of something else.
        SampleError: in strict mode, naming shard and key.
    """
    source = Path(source)
    check_dtype(dtype)
    parameters = {**vae_parameters(foundation_path), "dtype": dtype, "source": source_parameters(source)}
    parameters |= size_parameters(buckets)
    if prompts:
        parameters |= prompt_parameters(foundation_path)
    jobs = {
        name: _Job(str(path), part, str(foundation_path), prompts, dtype, device, tuple(buckets), strict)
        for path in list_shards(source)
        for name, part in _outputs(path)
    }
    description = f"encoding {source.name} shards"
    return build_folder(Path(target), Manifest("latents", parameters), jobs, _write, pool, description, share)


def source_parameters(source: Path) -> list[list[Any]]:
    """[name, bytes, sha256] of every shard; the checksum is the manifest's, None without a manifest."""
    manifest = Manifest.load(source)
    known = {(shard.name, shard.num_bytes): shard.sha256 for shard in manifest.shards} if manifest else {}
    sizes = {
        path.name: path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in walk_files(path))
        for path in list_shards(source)
    }
    return [[name, size, known.get((name, size))] for name, size in sizes.items()]


def _outputs(path: Path) -> Iterator[tuple[str, Scan | None]]:
    """Names of the shards made from one of the source's, and the samples that go there; None is all."""
    if path.suffix == ".tar" and path.is_file():
        yield path.name, None
        return
    (refs, errors), name = scan_shard(path), path.name if path.is_file() else "files"
    for number, start in enumerate(range(0, max(1, len(refs)), SAMPLES_PER_SHARD)):
        yield f"{name}-{number:06d}.tar", (refs[start : start + SAMPLES_PER_SHARD], [] if start else errors)


def decode_video(video: bytes, ref: SampleRef, num_frames: int, height: int, width: int) -> torch.Tensor:
    """:func:`univigu.data.video.read_video` of a sample's bytes, with its errors as SampleError."""
    try:
        return read_video(video, num_frames, height, width)
    except VideoError as error:
        raise SampleError("unreadable_video", ref.shard, ref.key, "video", str(error)) from error


# --------------------------------------------------------------- in a worker


@dataclass(frozen=True)
class _Job:
    """A shard to write."""

    source: str
    part: Scan | None
    """Samples of the source, and errors of others; None is all of it."""
    foundation: str
    prompts: bool
    dtype: LatentDtype
    device: str
    buckets: tuple[Bucket, ...]
    strict: bool


def _write(path: Path, job: _Job) -> ShardInfo:
    refs, errors = job.part or scan_shard(job.source)
    if errors and job.strict:
        raise errors[0]
    encoder = _encoder(job.foundation, job.device, job.dtype)
    info = write_shard(path, _encoded(encoder, refs, job, errors))
    info.skipped = [{"reason": e.reason, "key": e.key, "field": e.field, "value": e.value} for e in errors]
    return info


_Samples = list[tuple[SampleRef, dict[str, bytes], torch.Tensor]]


def _encoded(
    encoder: _Encoder, refs: list[SampleRef], job: _Job, errors: list[SampleError]
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Keys and members of the samples, by groups of clips that are encoded together."""
    from univigu.models.encode import group_size

    choose = BucketChooser(job.buckets)
    waiting: dict[Bucket, _Samples] = defaultdict(list)
    for ref in refs:
        try:
            bucket = job.buckets[choose(ref)]
            size = bucket.num_frames, bucket.height, bucket.width
            sample = ref.load()
            if sample.video is None:
                raise SampleError("missing_field", ref.shard, ref.key, "video", "the sample holds latents")
            frames = decode_video(sample.video, ref, *size)
            waiting[bucket].append((ref, encoder.texts(ref, sample.texts.prompt if job.prompts else None), frames))
        except SampleError as error:
            if job.strict:
                raise
            errors.append(without_traceback(error))
            continue
        if len(waiting[bucket]) == group_size(*size):
            yield from encoder.with_latents(waiting.pop(bucket))
    for samples in filter(None, waiting.values()):
        yield from encoder.with_latents(samples)


class _Encoder:
    """A foundation's VAE and text encoder, with results as members of a sample."""

    def __init__(self, foundation: str, device: str, dtype: LatentDtype) -> None:
        from univigu.models.foundation import Foundation

        self.foundation, self.device, self.dtype = Foundation(foundation).to(device), device, check_dtype(dtype)

    def with_latents(self, samples: _Samples) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        """Keys and members of samples whose clips are encoded together."""
        from univigu.models.encode import encode_clips

        clips = torch.stack([frames for _, _, frames in samples]).to(self.device)
        with torch.inference_mode():
            latents = encode_clips(self.foundation.vae, to_model_range(clips))
        for (ref, texts, _), of_clip in zip(samples, latents, strict=True):
            yield ref.key, {LATENTS_SUFFIX: self._packed(latents=of_clip), **texts}

    def texts(self, ref: SampleRef, prompt: str | None) -> dict[str, bytes]:
        """The json member, and the embeddings of the prompt if there is one."""
        from univigu.models.tokens import TextTooLongError

        raw = ref.read(TEXT_SUFFIX) or b""
        if prompt is None:
            return {TEXT_SUFFIX: raw}
        try:
            embeds = self.prompt_embeds(prompt)
        except TextTooLongError as error:
            raise SampleError("text_over_slot", ref.shard, ref.key, "prompt", str(error)) from error
        return {PROMPT_SUFFIX: self._packed(prompt=embeds, null=self.null_embeds), TEXT_SUFFIX: raw}

    def prompt_embeds(self, prompt: str) -> torch.Tensor:
        """Embeddings [S, text_dim] of a prompt of S tokens."""
        from univigu.models.encode import encode_prompts
        from univigu.models.tokens import tokenize

        parts = self.foundation
        ids = tokenize(parts.tokenizer, [prompt], MAX_PROMPT)
        ids = ids[:, : int((ids != parts.pad_token_id).sum())].to(self.device)
        with torch.inference_mode():
            return encode_prompts(parts.text_encoder, ids, parts.pad_token_id)[0]

    @cached_property
    def null_embeds(self) -> torch.Tensor:
        """Embeddings of the empty prompt."""
        return self.prompt_embeds("")

    def _packed(self, **tensors: torch.Tensor) -> bytes:
        from safetensors.torch import save

        return save({name: tensor.to("cpu", self.dtype).contiguous() for name, tensor in tensors.items()})


_encoder = lru_cache(maxsize=1)(_Encoder)
