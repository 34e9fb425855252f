"""Shards: plain tar files that the ``webdataset`` library reads too, indexed for random access.

Reading here goes through an index of (offset, size) a member, built by scanning the tar headers once, and not
through a sequential stream: a shuffle is then a permutation, and resuming exactly is a position in it.  webdataset's
own index reader (``wids``) is no longer part of webdataset 1.0, and the standard ``tarfile`` gives the offsets, so
the index is ours; it needs no dependency.

A folder of shards that this package wrote holds ``manifest.json``: what it was made of, and size and checksum of
every shard.  Video shards from elsewhere need none.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from univigu.data.sample import (
    TEXT_SUFFIX,
    VIDEO_SUFFIXES,
    DataError,
    SampleError,
    SampleReason,
    is_video,
    media_suffix,
)

MANIFEST = "manifest.json"
LIST_SUFFIXES = (".csv", ".jsonl")
FORMAT = 1
_NAME = re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$")  # webdataset's rule: the key ends at the first dot of the file name


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where a sample lies: nothing is read until it is asked for."""

    shard: str
    key: str
    members: dict[str, tuple[int, int]]
    """(offset, size) in bytes of each member, by suffix; a size of -1 is all that follows."""
    question: int | None = None
    """Which of the sample's questions is meant; None for its prompt and caption."""
    source: int = 0
    """Which of several sources it is from."""
    bucket: int = 0
    """Which of several sizes its video is brought to."""
    tokens: tuple[int, int] = (0, 0)
    """Of its prompt and of its caption, once they have been counted."""
    files: Mapping[str, str] | None = None
    """Paths of the members that do not lie in the shard, by suffix."""
    texts: bytes | None = None
    """The json member, where it lies nowhere as such."""

    def read(self, suffix: str) -> bytes | None:
        """A member's bytes, or None if the sample has no such member."""
        if suffix not in self.members:
            return None
        if suffix == TEXT_SUFFIX and self.texts is not None:
            return self.texts
        with self.open(suffix) as file:
            return self._read(file, suffix)

    def open(self, suffix: str) -> BinaryIO:
        """The file that a member lies in.

        Raises:
            SampleError: it is a file of its own, which cannot be opened.
        """
        path = (self.files or {}).get(suffix)
        if path is None:
            return open(self.shard, "rb")
        try:
            return open(path, "rb")
        except (OSError, ValueError) as error:
            reason: SampleReason = "missing_field" if suffix == TEXT_SUFFIX else "unreadable_video"
            raise SampleError(reason, self.shard, self.key, suffix, f"{path}: {error}") from error

    def _read(self, file: BinaryIO, suffix: str) -> bytes:
        offset, size = self.members[suffix]
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:  # the shard was cut off since it was scanned
            raise SampleError("damaged_shard", self.shard, self.key, suffix, f"{len(data)} of {size} bytes are there")
        return data

    def read_all(self) -> dict[str, bytes]:
        """All members' bytes by suffix."""
        if self.files is not None:
            return {suffix: self.read(suffix) or b"" for suffix in self.members}
        with open(self.shard, "rb") as file:
            return {suffix: self._read(file, suffix) for suffix in self.members}

    def check_media(self) -> None:
        """Raise SampleError (missing_field) if there is neither a video nor latents."""
        if media_suffix(self.members) is None:
            found = f"expected latents or one of {', '.join(VIDEO_SUFFIXES)}; the sample holds {sorted(self.members)}"
            raise SampleError("missing_field", self.shard, self.key, "video", found)


def list_shards(folder: str | Path) -> list[Path]:
    """What a folder holds samples in: tar files and lists, sorted by name, and itself if there are videos in it.

    A list (.csv or .jsonl) stands for itself, and beside one a folder's videos are samples only where it names them.

    Raises:
        DataError: the folder is missing or holds nothing of these.
    """
    from univigu.data.files import walk_files

    folder = Path(folder)
    if folder.is_file() and folder.suffix in LIST_SUFFIXES:
        return [folder]
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of shards, and no such list ({folder.name}.csv or .jsonl)")
    kinds = (".tar", *LIST_SUFFIXES)
    shards = sorted(path for path in folder.iterdir() if path.suffix in kinds and not path.name.startswith("."))
    if all(path.suffix == ".tar" for path in shards) and any(is_video(path) for path in walk_files(folder)):
        shards.append(folder)
    if not shards:
        raise DataError(f"{folder}: holds no .tar shard, no .csv or .jsonl list, and no video")
    return shards


def find_split(base: Path, split: str) -> Path:
    """A split's folder, or the list that stands in its place; the folder if there is neither."""
    lists = [base / f"{split}{suffix}" for suffix in LIST_SUFFIXES]
    return base / split if (base / split).is_dir() else next((path for path in lists if path.is_file()), base / split)


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix in small letters) of a member's name; None if it has no key or no suffix."""
    match = _NAME.match(name)
    return None if match is None else (match.group(1), match.group(2).lower())


def scan_shard(path: str | Path) -> tuple[list[SampleRef], list[SampleError]]:
    """Index one of the things that :func:`list_shards` lists; a shard by its tar headers.

    Returns:
        the samples that lie in it whole, in order, and what is wrong with the rest; never raises for damage.
    """
    from univigu.data.files import scan_files, scan_list

    if Path(path).is_dir():
        return scan_files(Path(path))
    return scan_list(Path(path)) if Path(path).suffix in LIST_SUFFIXES else _scan_tar(path)


def _scan_tar(path: str | Path) -> tuple[list[SampleRef], list[SampleError]]:
    shard, refs, errors = str(path), {}, []  # type: str, dict[str, SampleRef], list[SampleError]
    broken: set[str] = set()
    last = None
    for name, offset, size, problem in _scan(shard):
        if problem is not None and name is None:
            errors.append(SampleError("damaged_shard", shard, None, None, problem))
            continue
        parts = split_name(name or "")
        if parts is None:
            continue  # webdataset ignores such files too
        key, suffix = parts
        ref = refs.setdefault(key, SampleRef(shard, key, {}))
        if problem is not None:
            errors.append(SampleError("damaged_shard", shard, key, suffix, problem))
            broken.add(key)
        elif suffix in ref.members or (ref.members and key != last):
            if key not in broken:
                errors.append(SampleError("duplicate_member", shard, key, suffix, f"member {name!r}"))
            broken.add(key)
        else:
            ref.members[suffix] = (offset, size)
        last = key
    return [ref for key, ref in refs.items() if key not in broken], errors


def _scan(shard: str) -> Iterable[tuple[str | None, int, int, str | None]]:
    """Yield (name, offset, size, problem) a file; a problem without a name is the whole shard's."""
    total = os.path.getsize(shard)
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                if not member.isfile():
                    continue
                missing = member.offset_data + member.size - total
                problem = f"the shard ends {missing} bytes too early" if missing > 0 else None
                yield member.name, member.offset_data, member.size, problem
                if problem is not None:
                    return
            end = tar.offset
    except tarfile.ReadError as error:
        yield None, 0, 0, str(error)
        return
    # tarfile takes garbage between members, and a file cut off between them, for the archive's end
    with open(shard, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if not block:
        yield None, 0, 0, "no end-of-archive mark: the shard is cut off"
    elif block.strip(b"\0"):
        yield None, 0, 0, f"no tar header at byte {end}"


def index_folder(folder: str | Path) -> tuple[list[SampleRef], list[SampleError]]:
    """Index all shards of a folder, in the order of their names."""
    refs, errors = [], []
    for path in list_shards(folder):
        found, wrong = scan_shard(path)
        refs += found
        errors += wrong
    return refs, errors


# ------------------------------------------------------------------ writing


@dataclass
class ShardInfo:
    """A finished shard, as the manifest lists it."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """What of the source is not in this shard: {"reason", "key", "field", "value"} as of :class:`SampleError`."""


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardInfo:
    """Write samples (key, {suffix: bytes}) to a tar file that appears under its name only when it is whole.

    The same samples give the same bytes: members are sorted by suffix, and owner, mode and time are fixed.

    Raises:
        ValueError: a key that webdataset would split or that occurs twice.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    seen: set[str] = set()
    try:
        with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
            for key, members in samples:
                if not key or "." in key or key in seen:
                    raise ValueError(f"key={key!r}: expected a name without dots that is not yet in {path.name}")
                seen.add(key)
                for suffix in sorted(members):
                    info = tarfile.TarInfo(f"{key}.{suffix}")  # mtime, uid and gid are 0, names empty
                    info.size, info.mode = len(members[suffix]), 0o644
                    tar.addfile(info, io.BytesIO(members[suffix]))
        digest = sha256_of(temporary)
        size = temporary.stat().st_size
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return ShardInfo(path.name, len(seen), size, digest)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------- manifest


@dataclass
class Manifest:
    """What a folder of shards holds and what it was made of."""

    kind: Literal["video", "latents"]
    parameters: dict[str, Any]
    """Everything the content depends on: two folders with equal parameters hold the same samples.

    For latents: ``vae`` (fingerprint), ``dtype``, ``normalization``, ``height``, ``width``, ``num_frames`` and
    ``source`` (names and checksums of the shards that were encoded)."""
    shards: list[ShardInfo] = field(default_factory=list)
    complete: bool = False
    format: int = FORMAT

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def skipped(self, folder: str | Path) -> list[SampleError]:
        """What of the source is not here; ``folder`` is where the source's shards lie, for the messages."""
        return [SampleError(shard=str(Path(folder) / s.name), **row) for s in self.shards for row in s.skipped]

    @property
    def counts(self) -> dict[str, int]:
        """How many samples of the source are "kept", and how many are not, by reason."""
        reasons = Counter(row["reason"] for shard in self.shards for row in shard.skipped)
        return {"kept": self.num_samples, **dict(sorted(reasons.items()))}

    def save(self, folder: Path, name: str = MANIFEST) -> None:
        """Write the manifest, replacing an older one in one step."""
        self.shards.sort(key=lambda shard: shard.name)
        data = {**asdict(self), "num_samples": self.num_samples, "counts": self.counts}
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, folder / name)

    @classmethod
    def load(cls, folder: str | Path, name: str = MANIFEST) -> Manifest | None:
        """The folder's manifest, or None if it has none.

        Raises:
            DataError: the file is damaged or of a format this version does not know.
        """
        path = Path(folder) / name
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise DataError(f"{path}: format={data['format']!r}: this version reads format {FORMAT}")
            shards = [ShardInfo(**shard) for shard in data["shards"]]
            return cls(data["kind"], data["parameters"], shards, data["complete"])
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: not a manifest of shards ({type(error).__name__}: {error})") from error

    def check_files(self, folder: str | Path, checksums: bool = False) -> list[str]:
        """Names of listed shards that are missing or of another size (or, if asked for, content) than recorded."""
        wrong = []
        for shard in self.shards:
            path = Path(folder) / shard.name
            same = path.is_file() and path.stat().st_size == shard.num_bytes
            if not same or (checksums and sha256_of(path) != shard.sha256):
                wrong.append(shard.name)
        return wrong


def check_latents(folder: str | Path, manifest: Manifest, expected: Mapping[str, Any]) -> None:
    """Refuse latents that another VAE, normalisation or size made than the one in use.

    Args:
        expected: values that the manifest's parameters must have, such as ``vae`` and ``height``.

    Raises:
        DataError: naming the first parameter that differs, both values, and what to do.
    """
    if not manifest.complete:
        raise DataError(f"{folder}: only partly encoded; let data.precompute finish it")
    for name, value in expected.items():
        found = manifest.parameters.get(name)
        if found != value:
            raise DataError(
                f"{folder}: latents were encoded with {name}={found!r}, this run has {name}={value!r}; point "
                "data.shards at the videos and set data.precompute, so that they are encoded anew"
            )
