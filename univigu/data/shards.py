"""Folders of shards as this package writes them, and their manifests.  Shards from elsewhere need none.

A job writes one shard, and only the process that gives out the jobs writes the manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from filelock import FileLock, Timeout

from univigu.data.progress import track
from univigu.data.sample import DataError, SampleError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass
class ShardInfo:
    """A finished shard, as the manifest lists it."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Samples of the source that are missing here: {"reason", "key", "field", "value"} as of ``SampleError``."""


@contextmanager
def replacing(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """A temporary file, beside the path or another one, that takes the path's name if the block ends without error."""
    beside = beside or path
    temporary = beside.with_name(f".{beside.name}.{uuid4().hex[:12]}.tmp")  # unique on all machines
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardInfo:
    """Write samples (key, {suffix: bytes}) to a tar file that appears under its name only when it is complete.

    The same samples give the same bytes.  A key that webdataset would split or that occurs twice is a ValueError.
    """
    seen: set[str] = set()
    with replacing(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
            for key, members in samples:
                if not key or "." in key or key in seen:
                    raise ValueError(f"key={key!r}: expected a name without dots that is not yet in {path.name}")
                seen.add(key)
                for suffix in sorted(members):
                    info = tarfile.TarInfo(f"{key}.{suffix}")  # mtime, uid and gid are 0, names empty
                    info.size, info.mode = len(members[suffix]), 0o644
                    tar.addfile(info, io.BytesIO(members[suffix]))
        return ShardInfo(path.name, len(seen), temporary.stat().st_size, sha256_of(temporary))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Manifest:
    """The contents of a folder of shards and the parameters that produced them."""

    kind: Literal["video", "latents", "rows"]
    parameters: dict[str, Any]
    """Everything the content depends on: two folders with equal parameters hold the same samples."""
    shards: list[ShardInfo] = field(default_factory=list)
    complete: bool = False

    def skipped(self, folder: str | Path) -> list[SampleError]:
        """Errors of the skipped samples; ``folder`` holds the source's shards, for the messages."""
        return [SampleError(shard=str(Path(folder) / s.name), **row) for s in self.shards for row in s.skipped]

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of samples of the source: "kept", and skipped by reason."""
        reasons = Counter(row["reason"] for shard in self.shards for row in shard.skipped)
        return {"kept": sum(shard.num_samples for shard in self.shards), **dict(sorted(reasons.items()))}

    @property
    def state(self) -> str:
        """A line for people."""
        return f"complete: {len(self.shards)} shards, {self.counts}"

    def save(self, folder: Path) -> None:
        """Write the manifest, replacing an older one atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        self.shards.sort(key=lambda shard: shard.name)
        data = {**asdict(self), "num_samples": self.counts["kept"], "counts": self.counts}
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Manifest | None:
        """The folder's manifest, or None if it has none."""
        path = Path(folder) / MANIFEST
        return cls.parse(path.read_bytes(), str(path)) if path.is_file() else None

    @classmethod
    def parse(cls, text: bytes, where: str) -> Manifest:
        """The manifest in a file's content; raises DataError if it is damaged."""
        try:
            data = json.loads(text)
            shards = [ShardInfo(**shard) for shard in data["shards"]]
            return cls(data["kind"], data["parameters"], shards, data["complete"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{where}: not a manifest ({error!r})") from error

    def check_files(self, folder: Path) -> list[str]:
        """Names of listed shards that are missing or of another size than recorded."""
        paths = [(shard, folder / shard.name) for shard in self.shards]
        return [s.name for s, path in paths if not path.is_file() or path.stat().st_size != s.num_bytes]


Work = Callable[[Path, Any], ShardInfo]
"""Writes the shard of a path, given its job.  The same job gives the same bytes."""
Engine = Callable[[Work, Sequence[Path], Sequence[Any]], Iterable[ShardInfo]]
"""Applies work to paths and jobs like the built-in ``map``, in any order."""


def locked(folder: Path) -> AbstractContextManager[Any]:
    """Acquire the lock of a folder, which is created if need be; the lock of a killed process is released."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        log.warning("%s: waiting for another process that writes it", folder)
        return lock.acquire()


def build_folder(
    folder: Path, manifest: Manifest, jobs: Mapping[str, Any], work: Work, engine: Engine = map
) -> Manifest:
    """Write the shards that are missing or damaged, and the complete manifest.

    The manifest lists a shard as soon as it is finished, so that a run that was killed continues.

    Args:
        manifest: kind and parameters of the result; a folder of other parameters is a DataError.
        jobs: the argument of ``work`` by the shard's file name.
        engine: where the jobs run: ``map`` here, a pool's ``map``, or ``univigu.data.engine.RayEngine``.
    """
    found, finished = _load(folder, manifest)
    if found.complete and len(finished) == len(jobs):  # such a folder may be read-only
        return found
    with locked(folder):
        _, manifest.shards = _load(folder, manifest)  # another process may have written it meanwhile
        manifest.complete = len(manifest.shards) == len(jobs)
        manifest.save(folder)
        names = sorted(jobs.keys() - {shard.name for shard in manifest.shards})
        written = engine(work, [folder / name for name in names], [jobs[name] for name in names])
        for info in track(written, f"{folder}: shards", len(names)):
            manifest.shards.append(info)
            manifest.save(folder)
        for path in folder.glob(".*.tmp"):  # of killed processes
            path.unlink(missing_ok=True)
        manifest.complete = True
        manifest.save(folder)
    return manifest


def _load(folder: Path, manifest: Manifest) -> tuple[Manifest, list[ShardInfo]]:
    """The folder's manifest, and those of its shards that need not be written again; a DataError for another run's."""
    found, shard = Manifest.load(folder), next(folder.glob("*.tar"), None)
    if found is None and shard is not None:
        raise DataError(f"{folder}: holds shards of unknown origin ({shard.name}, ...); choose another folder")
    if found is None:
        return manifest, []
    old, new = ({"kind": m.kind, **json.loads(json.dumps(m.parameters))} for m in (found, manifest))
    for name in sorted(old.keys() | new.keys()) if found.shards or shard is not None else ():
        if old.get(name) != new.get(name):
            was, now = (f"{name}={parameters.get(name)!r:.80}" for parameters in (old, new))
            raise DataError(f"{folder}: was made with {was}, this run has {now}; delete the folder or choose another")
    damaged = found.check_files(folder)
    return found, [shard for shard in found.shards if shard.name not in damaged]
