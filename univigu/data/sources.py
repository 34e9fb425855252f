"""Data sources: folders or URLs of shards, their weights, and the latents and prompt embeddings encoded from them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from univigu.data.buckets import Bucket, choose_bucket
from univigu.data.engine import exclusive
from univigu.data.index import TARS, Scan, find_split, index_folder, list_shards, plain_files, scan_shard
from univigu.data.options import check_dtype
from univigu.data.sample import LATENTS_SUFFIX, PROMPT_SUFFIX, TEXT_SUFFIX, DataError, SampleError, SampleRef
from univigu.data.shards import MANIFEST, Engine, Manifest, ShardInfo, build_folder, replacing, sha256_of, write_shard
from univigu.data.video import to_model_range
from univigu.models.encode import encode_clips, encode_prompts, group_size
from univigu.models.fingerprint import folder_fingerprint
from univigu.models.foundation import Foundation
from univigu.models.tokens import TextTooLongError, tokenize

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]
SAMPLES_PER_SHARD = 500
"""Samples of a shard that is encoded from a list or a folder of files."""
LARGE = {"text_encoder": 2 * 2**30, "vae": 2**26}
"""Bytes over which a component runs on the GPU, or in one process; smaller ones are faster on each core of the CPU."""
MAX_PROMPT = 512
"""Most tokens of Wan's text encoder; samples with longer prompts are left out."""


@dataclass(frozen=True)
class Source:
    """Shards that are mixed with others."""

    path: str
    """Folder or URL with train/ and, if it takes part in evaluation, val/ and test/."""
    weight: float | None = None
    """Share of this source in training, relative to the others'; None (for all of them) takes every sample once."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"data.shards: weight={self.weight} of {self.path!r}: expected a number over 0")


def source_weights(sources: Sequence[Source]) -> list[float] | None:
    """The sources' weights, None if none has one; raises ValueError if only some have, or a source is there twice."""
    paths, weights = [source.path for source in sources], [s.weight for s in sources if s.weight is not None]
    if not paths or len(set(paths)) < len(paths):
        raise ValueError(f"data.shards={paths}: expected at least one source, each of them once")
    if weights and len(weights) < len(sources):
        missing = next(source.path for source in sources if source.weight is None)
        raise ValueError(f"data.shards: {missing!r} has no weight, but others have; give all of them one, or none")
    return weights or None


class SourceFolder:
    """A source on this machine (``base``), copied to ``root`` if it is a URL, with the latents computed from it."""

    def __init__(self, path: str, root: str, foundation: str, buckets: Sequence[Bucket], precompute: bool) -> None:
        self.url = path.rstrip("/") if "://" in path else None
        self.base = Path(path)
        if self.url is not None:
            self.base = Path(root) / "remote" / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.foundation, self.buckets, self.precompute = foundation, tuple(buckets), precompute

    def videos(self, split: Split) -> Path:
        """The original shards: a folder, or a list of paths."""
        return find_split(self.base, split)

    def folder(self, split: Split) -> Path:
        """The shards that are loaded: the originals, or the latents computed from them."""
        videos = self.videos(split)
        manifest = Manifest.load(videos)
        if not self.precompute or (manifest is not None and manifest.kind == "latents"):
            return videos
        encoders, sizes = encoder_parameters(self.foundation, self.buckets), str(self.buckets[0])
        if len(self.buckets) > 1:
            digest = hashlib.sha256(" ".join(map(str, self.buckets)).encode()).hexdigest()[:8]
            sizes = f"{len(self.buckets)}buckets-{digest}"
        return self.base / f"latents-{encoders['vae']}-{encoders['text_encoder']}-{sizes}" / split

    def index(self, split: Split) -> Scan:
        """The split's samples, and errors of the others; a DataError for latents of other encoders, sizes or videos."""
        folder, videos = self.folder(split), self.videos(split)
        manifest = Manifest.load(folder)
        if manifest is None or manifest.kind == "video":
            if folder != videos:
                raise DataError(f"{folder}: has not been encoded; run prepare_data first")
            refs, errors = index_folder(folder)
            if any(LATENTS_SUFFIX in ref.members for ref in refs):
                raise DataError(f"{folder}: holds latents but no manifest.json, so nothing says which VAE made them")
            return refs, errors
        if not manifest.complete or manifest.check_files(folder):
            raise DataError(f"{folder}: only partly encoded; let data.precompute finish it")
        prompts = "text_encoder" in manifest.parameters  # else they are encoded during training
        expected = encoder_parameters(self.foundation, self.buckets, prompts)
        if folder != videos:
            expected["source"] = source_parameters(videos)
        for name, value in expected.items():
            found = manifest.parameters.get(name)
            if found != value:
                was = f"{folder}: latents were encoded with {name}={found!r}, this run has {name}={value!r}"
                raise DataError(f"{was}; set data.shards to the videos and data.precompute, to encode them again")
        refs, errors = index_folder(folder)
        return refs, manifest.skipped(videos) + errors


def fetch_shards(url: str, folder: Path, optional: bool = False) -> None:
    """Copy a remote folder of shards by fsspec (http, s3, ...), but for those that are here already, or a DataError.

    A shard has the checksum of the remote manifest or, without one, the size that the server says.
    """
    import fsspec

    url = url.rstrip("/")
    try:
        system, path = fsspec.core.url_to_fs(url)
        manifest = system.cat_file(f"{path}/{MANIFEST}") if system.exists(f"{path}/{MANIFEST}") else None
        if manifest is not None:
            sums = {shard.name: shard.sha256 for shard in Manifest.parse(manifest, f"{url}/{MANIFEST}").shards}
        elif optional and not system.exists(path):
            return
        else:
            names = {str(item).rstrip("/").rpartition("/")[2] for item in system.ls(path, detail=False)}
            sums = dict.fromkeys(sorted(name for name in names if name.lower().endswith(TARS)), "")
            if others := len(names) - len(sums):
                log.warning("%s: %d files and folders that are no shards are left out", url, others)
        if not sums:
            raise DataError(f"{url}: holds no .tar shard")
        folder.mkdir(parents=True, exist_ok=True)
        for name, checksum in sums.items():
            source, target = f"{path}/{name}", folder / name
            if target.exists() and (
                sha256_of(target) == checksum if checksum else target.stat().st_size == system.size(source)
            ):
                continue
            log.info("fetching %s/%s (of %d shards)", url, name, len(sums))
            with replacing(target) as temporary:
                system.get_file(source, str(temporary))
                if checksum and sha256_of(temporary) != checksum:
                    raise DataError(f"{url}/{name}: arrived with another checksum than the manifest says")
        if manifest is not None:  # last, as it marks the copy as complete
            with replacing(folder / MANIFEST) as temporary:
                temporary.write_bytes(manifest)
    except DataError:
        raise
    except Exception as error:  # of many types, by the protocol
        raise DataError(f"{url}: cannot be read ({type(error).__name__}: {error})") from error


def encoder_parameters(foundation: str | Path, buckets: Sequence[Bucket], prompts: bool = True) -> dict[str, Any]:
    """What identifies latents (and prompt embeddings): fingerprints of the encoders, normalisation, and sizes."""
    folder = Foundation(foundation).path  # checks that it is complete
    try:
        config = json.loads((folder / "vae" / "config.json").read_text())
        normalization = {"mean": config["latents_mean"], "std": config["latents_std"], "of": "mode"}
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"foundation={str(foundation)!r}: no readable vae/config.json ({error!r})") from error
    sizes = asdict(buckets[0]) if len(buckets) == 1 else {"buckets": [str(bucket) for bucket in buckets]}
    names = ("vae", "text_encoder", "tokenizer") if prompts else ("vae",)
    encoders = {name: folder_fingerprint(folder / name) for name in names}
    return {**encoders, "normalization": normalization, **sizes}


def is_large(foundation_path: str | Path, component: Literal["text_encoder", "vae"]) -> bool:
    """Whether the weights of a foundation's component have more bytes than ``LARGE`` says."""
    files = (Path(foundation_path) / component).glob("*.safetensors")
    return sum(path.stat().st_size for path in files) > LARGE[component]


def source_parameters(source: Path) -> list[list[Any]]:
    """[name, bytes, sha256] of every shard; the checksum is the manifest's, None without a manifest."""
    manifest = Manifest.load(source)
    known = {(shard.name, shard.num_bytes): shard.sha256 for shard in manifest.shards} if manifest else {}
    files = {_name(source, path): [path] if path.is_file() else plain_files(path) for path in list_shards(source)}
    sizes = [(name, sum(file.stat().st_size for file in found)) for name, found in files.items()]
    return [[*size, known.get(size)] for size in sizes]


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
        source: folder of shards, videos or lists; each shard gives one with the same name, keys and texts.
        foundation_path: WanPipeline folder whose VAE and text encoder are used.
        dtype: storage type of latents and embeddings; they are computed in float32.
        strict: raise for the first sample that cannot be encoded instead of recording it in the manifest.
        prompts: whether to store the prompts' embeddings too.
    """
    source, storage = Path(source), check_dtype(dtype)
    parameters = encoder_parameters(foundation_path, buckets, prompts)
    parameters |= {"dtype": dtype, "source": source_parameters(source)}
    jobs = dict[str, Path | Scan]()  # a whole tar, or some samples of a list or of a folder of files
    for path in list_shards(source):
        name = _name(source, path) if path.is_file() else "files"
        if name.endswith(".tar"):
            jobs[name] = path
            continue
        refs, errors = scan_shard(path)
        for number, start in enumerate(range(0, max(1, len(refs)), SAMPLES_PER_SHARD)):
            jobs[f"{name}-{number:06d}.tar"] = refs[start : start + SAMPLES_PER_SHARD], [] if start else errors
    work = _ShardEncoder(str(foundation_path), device, storage, prompts, tuple(buckets), strict)
    return build_folder(Path(target), Manifest("latents", parameters), jobs, work, engine)


_Members = dict[str, bytes]


@lru_cache(maxsize=1)
def _foundation(path: str, device: str) -> Foundation:
    return Foundation(path).to(device)


@dataclass(frozen=True)
class _ShardEncoder:
    """Encodes a shard; see ``encode_shards`` for the arguments."""

    foundation_path: str
    device: str
    dtype: torch.dtype
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

    def _samples(self, refs: list[SampleRef], errors: list[SampleError]) -> Iterator[tuple[str, _Members]]:
        """Keys and members of the samples, by groups of clips that are encoded together."""
        waiting: dict[Bucket, list[tuple[str, _Members, torch.Tensor]]] = defaultdict(list)
        for ref in refs:
            try:
                prompt = ref.texts()["prompt"]
                if ref.media == LATENTS_SUFFIX:
                    raise ref.error("missing_field", "video", "the sample holds latents")
                bucket = self.buckets[choose_bucket(ref, self.buckets)]
                members = {TEXT_SUFFIX: ref.read(TEXT_SUFFIX)}
                if self.prompts:
                    try:
                        members[PROMPT_SUFFIX] = self._packed(prompt=self._embeds(prompt), null=self._embeds(""))
                    except TextTooLongError as error:
                        raise ref.error("text_over_slot", "prompt", str(error)) from error
                frames = ref.video(bucket.num_frames, bucket.height, bucket.width)
            except SampleError as error:
                if self.strict:
                    raise
                errors.append(copy(error))  # without the traceback, which keeps decoded frames in memory
                continue
            waiting[bucket].append((ref.key, members, frames))
            if len(waiting[bucket]) == group_size(bucket.num_frames, bucket.height, bucket.width):
                yield from self._encoded(waiting.pop(bucket))
        for clips in waiting.values():
            yield from self._encoded(clips)

    def _encoded(self, clips: list[tuple[str, _Members, torch.Tensor]]) -> Iterator[tuple[str, _Members]]:
        latents = self._latents(torch.stack([frames for *_, frames in clips]))
        for (key, members, _), of_clip in zip(clips, latents, strict=True):
            yield key, {LATENTS_SUFFIX: self._packed(latents=of_clip), **members}

    def _packed(self, **tensors: torch.Tensor) -> bytes:
        return save({name: tensor.to(self.dtype).contiguous() for name, tensor in tensors.items()})

    @exclusive("encoder")
    @torch.inference_mode()
    def _latents(self, frames: torch.Tensor) -> torch.Tensor:
        vae = _foundation(self.foundation_path, self.device).vae
        return encode_clips(vae, to_model_range(frames.to(self.device))).cpu()

    @exclusive("encoder")
    @lru_cache(maxsize=2)  # noqa: B019  # the empty prompt's are asked for with every sample
    @torch.inference_mode()
    def _embeds(self, prompt: str) -> torch.Tensor:
        """Embeddings [S, text_dim] of a prompt of S tokens."""
        parts = _foundation(self.foundation_path, self.device)
        ids = tokenize(parts.tokenizer, [prompt], MAX_PROMPT)
        ids = ids[:, : int((ids != parts.pad_token_id).sum())].to(self.device)
        return encode_prompts(parts.text_encoder, ids, parts.pad_token_id)[0].cpu()
