"""Precomputation: video shards to shards of latents and prompt embeddings, so that training runs neither encoder.

On the same device float32 values are bit for bit those that training computes: both use ``univigu.models.encode``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from univigu.data.buckets import Bucket, choose_bucket
from univigu.data.engine import Model
from univigu.data.index import Scan, list_shards, plain_files, scan_shard
from univigu.data.options import check_dtype
from univigu.data.sample import LATENTS_SUFFIX, PROMPT_SUFFIX, TEXT_SUFFIX, DataError, SampleError, SampleRef
from univigu.data.shards import Engine, Manifest, ShardInfo, build_folder, write_shard
from univigu.data.video import to_model_range
from univigu.models.encode import encode_clips, encode_prompts, group_size
from univigu.models.fingerprint import folder_fingerprint
from univigu.models.foundation import Foundation
from univigu.models.tokens import TextTooLongError, tokenize

SAMPLES_PER_SHARD = 500
"""Samples of a shard that is encoded from a list or a folder of files."""
LARGE_ENCODER = 2 * 2**30
"""Bytes of a text encoder from which on it takes seconds a prompt on a CPU."""
MAX_PROMPT = 512
"""Most tokens of Wan's text encoder; samples with longer prompts are left out."""


def encoder_parameters(foundation: str | Path, buckets: Sequence[Bucket], prompts: bool = True) -> dict[str, Any]:
    """What identifies latents (and prompt embeddings): fingerprints of the encoders, normalisation, and sizes."""
    names = ("vae", "text_encoder", "tokenizer") if prompts else ("vae",)
    folders = {name: Path(foundation) / name for name in names}
    try:
        config = json.loads((folders["vae"] / "config.json").read_text())
        normalization = {"mean": config["latents_mean"], "std": config["latents_std"], "of": "mode"}
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"foundation={str(foundation)!r}: no readable vae/config.json ({error!r})") from error
    for name, folder in folders.items():
        if not folder.is_dir():
            raise DataError(f"foundation={str(foundation)!r}: it holds no {name} folder")
    sizes = asdict(buckets[0]) if len(buckets) == 1 else {"buckets": [str(bucket) for bucket in buckets]}
    encoders = {name: folder_fingerprint(folder) for name, folder in folders.items()}
    return {**encoders, "normalization": normalization, **sizes}


def has_large_encoder(foundation_path: str | Path) -> bool:
    """Whether the text encoder is so large that on a CPU only one process should run it."""
    files = (Path(foundation_path) / "text_encoder").glob("*.safetensors")
    return sum(path.stat().st_size for path in files) > LARGE_ENCODER


def source_parameters(source: Path) -> list[list[Any]]:
    """[name, bytes, sha256] of every shard; the checksum is the manifest's, None without a manifest."""
    manifest, result = Manifest.load(source), list[list[Any]]()
    known = {(shard.name, shard.num_bytes): shard.sha256 for shard in manifest.shards} if manifest else {}
    for path in list_shards(source):
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else plain_files(path)))
        name = _name(source, path)
        result.append([name, size, known.get((name, size))])
    return result


def _name(source: Path, shard: Path) -> str:
    """A shard's name, with those of the folders between it and the source."""
    return "--".join(shard.relative_to(source).parts) or shard.name


def encode_shards(
    source: str | Path,
    target: str | Path,
    foundation_path: str | Path,
    dtype: str = "float32",
    buckets: Sequence[Bucket] = (Bucket(64, 64, 9),),
    strict: bool = False,
    engine: Engine = map,
    prompts: bool = True,
    device: str = "cpu",
) -> Manifest:
    """Encode every shard of a folder; complete shards of the target stay, missing ones are written.

    Args:
        source: folder of shards, videos or lists.
        target: folder for the encoded shards; each shard of the source gives one with the same name, keys and texts.
        foundation_path: WanPipeline folder whose VAE and text encoder are used.
        dtype: storage type of latents and embeddings; they are computed in float32.
        buckets: sizes of the clips; each clip gets the one that fits it best.
        strict: raise for the first sample that cannot be encoded instead of recording it in the manifest.
        prompts: whether to store the prompts' embeddings too.
        device: where the models run.
        engine: where the jobs run, see ``build_folder``.
    """
    source = Path(source)
    check_dtype(dtype)
    parameters = encoder_parameters(foundation_path, buckets, prompts)
    parameters |= {"dtype": dtype, "source": source_parameters(source)}
    jobs = {name: job for path in list_shards(source) for name, job in _jobs(source, path)}
    work = _ShardEncoder(Encoder(str(foundation_path), device), dtype, prompts, tuple(buckets), strict)
    return build_folder(Path(target), Manifest("latents", parameters), jobs, work, engine)


def _jobs(source: Path, path: Path) -> Iterator[tuple[str, Path | Scan]]:
    """Names of the shards encoded from one of the source's, and what goes there: a whole tar, or some samples."""
    name = _name(source, path) if path.is_file() else "files"
    if name.endswith(".tar"):
        yield name, path
        return
    refs, errors = scan_shard(path)
    for number, start in enumerate(range(0, max(1, len(refs)), SAMPLES_PER_SHARD)):
        yield f"{name}-{number:06d}.tar", (refs[start : start + SAMPLES_PER_SHARD], [] if start else errors)


@lru_cache(maxsize=1)
def _foundation(path: str, device: str) -> Foundation:
    return Foundation(path).to(device)


@dataclass(frozen=True)
class Encoder(Model):
    """A foundation's VAE and text encoder; results are on the CPU."""

    path: str
    device: str

    def latents(self, frames: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, T, H, W] of clips uint8 [B, F, C, H, W]."""
        with torch.inference_mode():
            return encode_clips(_foundation(self.path, self.device).vae, to_model_range(frames.to(self.device))).cpu()

    @lru_cache(maxsize=2)  # noqa: B019  # the empty prompt's are asked for with every sample
    def prompt_embeds(self, prompt: str) -> torch.Tensor:
        """Embeddings [S, text_dim] of a prompt of S tokens."""
        parts = _foundation(self.path, self.device)
        ids = tokenize(parts.tokenizer, [prompt], MAX_PROMPT)
        ids = ids[:, : int((ids != parts.pad_token_id).sum())].to(self.device)
        with torch.inference_mode():
            return encode_prompts(parts.text_encoder, ids, parts.pad_token_id)[0].cpu()


_Clip = tuple[SampleRef, dict[str, bytes], torch.Tensor]
"""A sample, its members without the latents, and its frames."""


@dataclass
class _ShardEncoder:
    """Encodes a shard; see ``encode_shards`` for the arguments."""

    encoder: Encoder
    dtype: str
    prompts: bool
    buckets: tuple[Bucket, ...]
    strict: bool

    def __call__(self, path: Path, job: Path | Scan) -> ShardInfo:
        refs, errors = scan_shard(job) if isinstance(job, Path) else job
        if errors and self.strict:
            raise errors[0]
        info = write_shard(path, self._samples(refs, errors))
        info.skipped = [{"reason": e.reason, "key": e.key, "field": e.field, "value": e.value} for e in errors]
        return info

    def _samples(self, refs: list[SampleRef], errors: list[SampleError]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        """Keys and members of the samples, by groups of clips that are encoded together."""
        waiting: dict[Bucket, list[_Clip]] = defaultdict(list)
        for ref in refs:
            try:
                texts = ref.texts()
                if ref.media == LATENTS_SUFFIX:
                    raise ref.error("missing_field", "video", "the sample holds latents")
                bucket = self.buckets[choose_bucket(ref, self.buckets)]
                members = self._texts(ref, texts.prompt)
                frames = ref.video(bucket.num_frames, bucket.height, bucket.width)
                waiting[bucket].append((ref, members, frames))
            except SampleError as error:
                if self.strict:
                    raise
                errors.append(copy(error))  # without the traceback, which keeps decoded frames in memory
                continue
            if len(waiting[bucket]) == group_size(bucket.num_frames, bucket.height, bucket.width):
                yield from self._encoded(waiting.pop(bucket))
        for clips in filter(None, waiting.values()):
            yield from self._encoded(clips)

    def _texts(self, ref: SampleRef, prompt: str) -> dict[str, bytes]:
        """The json member, and the prompt's embeddings if they are stored."""
        texts = {TEXT_SUFFIX: ref.read(TEXT_SUFFIX)}
        if self.prompts:
            try:
                embeds, null = (self.encoder.prompt_embeds(text) for text in (prompt, ""))
            except TextTooLongError as error:
                raise ref.error("text_over_slot", "prompt", str(error)) from error
            texts[PROMPT_SUFFIX] = self._packed(prompt=embeds, null=null)
        return texts

    def _encoded(self, clips: list[_Clip]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        latents = self.encoder.latents(torch.stack([frames for _, _, frames in clips]))
        for (ref, texts, _), of_clip in zip(clips, latents, strict=True):
            yield ref.key, {LATENTS_SUFFIX: self._packed(latents=of_clip), **texts}

    def _packed(self, **tensors: torch.Tensor) -> bytes:
        dtype = check_dtype(self.dtype)
        return save({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()})
