"""Where shards lie: a folder, a URL, several of these mixed by weights, and the latents that were made of each."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from univigu.data.buckets import Bucket, size_parameters
from univigu.data.build import SpawnPool
from univigu.data.encode import encode_shards, prompt_parameters, source_parameters, vae_parameters
from univigu.data.remote import fetch_shards, is_remote, local_folder, remote_exists
from univigu.data.sample import LATENTS_SUFFIX, DataError, SampleError
from univigu.data.shards import Manifest, SampleRef, check_latents, find_split, index_folder, list_shards

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Source:
    """Shards that are mixed with others."""

    shards: str
    """Folder or URL with train/ and, if it takes part in evaluation, val/ and test/."""
    weight: float | None = None
    """Share of this source in training, relative to the others'; None (for all of them) takes every sample once."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"data.sources: weight={self.weight} of {self.shards!r}: expected a number over 0")


def weights_of(sources: Sequence[Source]) -> list[float] | None:
    """The sources' weights, None if none has one.

    Raises:
        ValueError: there is no source, one occurs twice, or only some have a weight.
    """
    places = [source.shards for source in sources]
    if not places:
        raise ValueError("data.sources=[]: expected at least one source")
    if len(set(places)) < len(places):
        raise ValueError(f"data.sources: {max(places, key=places.count)!r} is there twice; give it a higher weight")
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        bare = next(source.shards for source in sources if source.weight is None)
        raise ValueError(f"data.sources: {bare!r} has no weight, but others have; give all of them one, or none")
    return weights or None


@dataclass(frozen=True)
class LatentsOptions:
    """How shards are encoded."""

    foundation: str
    """WanPipeline folder whose encoders the latents are made with."""
    buckets: tuple[Bucket, ...]
    """Sizes that videos are brought to."""
    precompute: bool
    """Whether videos are encoded before they are trained on."""


@dataclass(frozen=True)
class Place:
    """The shards of one source on this machine, and the latents made of them beside them."""

    base: Path
    """Folder with train/, val/ and test/."""
    latents: LatentsOptions
    """How they are encoded."""
    url: str | None = None
    """Where the shards are copied from."""

    @classmethod
    def of(cls, shards: str, root: str, latents: LatentsOptions) -> Place:
        """The place of a folder or URL; copies go to ``root``."""
        if is_remote(shards):
            return cls(local_folder(shards, root), latents, shards.rstrip("/"))
        return cls(Path(shards), latents)

    def fetch(self, split: Split, optional: bool = False) -> None:
        """Copy a remote split to this machine; ``optional``: if there is one."""
        if self.url is None or (optional and not remote_exists(f"{self.url}/{split}")):
            return
        fetch_shards(f"{self.url}/{split}", self.base / split)

    def has(self, split: Split) -> bool:
        """Whether there is such a split here."""
        return self.videos(split).exists()

    def check(self, split: Split) -> None:
        """Raise a DataError if the split is not there or holds nothing, before hours go into encoding another."""
        try:
            list_shards(self.videos(split))
        except DataError as error:
            if split != "val" or self.has(split):
                raise
            raise DataError(f"{error}; training measures its held-out losses on clips kept apart there") from None

    def videos(self, split: Split) -> Path:
        """The original shards: a folder, or a list of paths."""
        return find_split(self.base, split)

    def folder(self, split: Split) -> Path:
        """The shards that are trained on: the originals, or the latents made of them."""
        videos = self.videos(split)
        if not self.latents.precompute or _holds_latents(videos):
            return videos
        foundation, buckets = self.latents.foundation, self.latents.buckets
        encoders = vae_parameters(foundation)["vae"], prompt_parameters(foundation)["text_encoder"]
        sizes = str(buckets[0])
        if len(buckets) > 1:
            digest = hashlib.sha256(" ".join(map(str, buckets)).encode()).hexdigest()[:8]
            sizes = f"{len(buckets)}buckets-{digest}"
        return self.base / "-".join(("latents", *encoders, sizes)) / split

    def is_ready(self, split: Split) -> bool:
        """Whether the split need not be encoded, or has been; a folder that has lost files is not looked through."""
        source, target = self.videos(split), self.folder(split)
        manifest = None if source == target else Manifest.load(target)
        return source == target or (manifest is not None and manifest.complete)

    def encode(self, split: Split, strict: bool, pool: SpawnPool, device: str) -> None:
        """Encode the split in the pool's processes, if it is to be and has not been."""
        source, target, options = self.videos(split), self.folder(split), self.latents
        if source != target:
            encode_shards(
                source, target, options.foundation, buckets=options.buckets, strict=strict, pool=pool, device=device
            )

    def index(self, split: Split) -> tuple[list[SampleRef], list[SampleError]]:
        """The split's samples, and what is wrong with the rest.

        Raises:
            DataError: there are no shards, or latents of which it is not known that they are the right ones.
        """
        folder = self.folder(split)
        errors = self._check_manifest(split)
        refs, damage = index_folder(folder)
        if Manifest.load(folder) is None and any(LATENTS_SUFFIX in ref.members for ref in refs):
            raise DataError(f"{folder}: holds latents but no manifest.json, so nothing says which VAE made them")
        return refs, errors + damage

    def _check_manifest(self, split: Split) -> list[SampleError]:
        """Check that precomputed latents are the right ones; returns what had to be left out of them."""
        folder, videos = self.folder(split), self.videos(split)
        manifest = Manifest.load(folder)
        if manifest is None or manifest.kind == "video":
            if folder != videos:
                raise DataError(f"{folder}: has not been encoded; run prepare_data first")
            return []
        expected = {**vae_parameters(self.latents.foundation), **size_parameters(self.latents.buckets)}
        if "text_encoder" in manifest.parameters:  # else there are latents alone, and prompts are encoded in training
            expected |= prompt_parameters(self.latents.foundation)
        if folder != videos:
            expected["source"] = source_parameters(videos)
        check_latents(folder, manifest, expected)
        return manifest.skipped(videos)


def _holds_latents(folder: Path) -> bool:
    manifest = Manifest.load(folder)
    return manifest is not None and manifest.kind == "latents"
