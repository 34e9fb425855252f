"""Data sources: folders or URLs of shards, their weights, and the latents that are computed from them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from univigu.data.buckets import Bucket
from univigu.data.encode import encode_shards, encoder_parameters, source_parameters
from univigu.data.index import TARS, Scan, find_split, index_folder
from univigu.data.sample import LATENTS_SUFFIX, DataError
from univigu.data.shards import MANIFEST, Engine, Manifest, replacing, sha256_of

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]


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

    def fetch(self, split: Split) -> None:
        """Copy a remote split to this machine; all but train may be missing there."""
        if self.url is not None:
            fetch_shards(f"{self.url}/{split}", self.base / split, optional=split != "train")

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

    def encode(self, split: Split, strict: bool, engine: Engine, device: str) -> None:
        """Encode the split, if it needs to be."""
        source, target = self.videos(split), self.folder(split)
        if source != target:
            encode_shards(source, target, self.foundation, "float32", self.buckets, strict, engine, device=device)

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
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be read ({type(error).__name__}: {error})") from error
