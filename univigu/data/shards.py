"""Tar shards as this package writes them, and the manifest of a folder of them.  Shards from elsewhere need none."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from univigu.data.sample import DataError, SampleError

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
    """Hexadecimal SHA-256 of a file."""
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

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def skipped(self, folder: str | Path) -> list[SampleError]:
        """Errors of the skipped samples; ``folder`` holds the source's shards, for the messages."""
        return [SampleError(shard=str(Path(folder) / s.name), **row) for s in self.shards for row in s.skipped]

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of samples of the source: "kept", and skipped by reason."""
        reasons = Counter(row["reason"] for shard in self.shards for row in shard.skipped)
        return {"kept": self.num_samples, **dict(sorted(reasons.items()))}

    @property
    def state(self) -> str:
        """A line for people."""
        return f"complete: {len(self.shards)} shards, {self.counts}"

    def save(self, folder: Path) -> None:
        """Write the manifest, replacing an older one atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        self.shards.sort(key=lambda shard: shard.name)
        data = {**asdict(self), "num_samples": self.num_samples, "counts": self.counts}
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Manifest | None:
        """The folder's manifest, or None if it has none."""
        path = Path(folder) / MANIFEST
        try:
            return cls.parse(path.read_bytes(), str(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    @classmethod
    def parse(cls, text: bytes, where: str) -> Manifest:
        """The manifest in a file's content; raises DataError if it is damaged."""
        try:
            data = json.loads(text)
            shards = [ShardInfo(**shard) for shard in data["shards"]]
            return cls(data["kind"], data["parameters"], shards, data["complete"])
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{where}: not a manifest ({error!r})") from error

    def check_files(self, folder: Path) -> list[str]:
        """Names of listed shards that are missing or of another size than recorded."""
        paths = [(shard, folder / shard.name) for shard in self.shards]
        return [s.name for s, path in paths if not path.is_file() or path.stat().st_size != s.num_bytes]
