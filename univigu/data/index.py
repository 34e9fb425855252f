"""Indexes samples for random access: members of tar shards, plain files in folders, and rows of lists.

A shuffle is then a permutation and resuming exactly a position in it, which a sequential stream cannot give.  Tar
headers are scanned once for (offset, size) of each member; webdataset 1.0 has no index reader of its own any more.
A folder may hold ``name.mp4`` beside ``name.json``; a list is a .jsonl or .csv file whose ``video`` is a path relative
to the list, and whose other fields are those of a sample's json.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from univigu.data.rows import Row, read_rows
from univigu.data.sample import (
    TEXT_SUFFIX,
    VIDEO_SUFFIXES,
    DataError,
    Sample,
    SampleError,
    SampleReason,
    is_video,
    parse_sample,
)
from univigu.data.shards import MANIFEST

LIST_SUFFIXES = (".csv", ".jsonl")
_NAME = re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$")  # webdataset's rule: the key ends at the first dot of the file name
Scan = tuple[list["SampleRef"], list[SampleError]]
"""Usable samples in order, and errors of the others."""


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Location of a sample; its members are read on demand."""

    shard: str
    key: str
    members: dict[str, tuple[str, int, int]]
    """(file, offset, size) of each member, by suffix; a size of -1 is the rest of the file."""
    question: int | None = None
    """Number of the sample's question that is used; None for its prompt and caption."""
    source: int = 0
    """Number of the data source."""
    bucket: int = 0
    """Number of the size that its video is brought to."""
    tokens: tuple[int, int] = (0, 0)
    """Tokens of prompt and caption, once counted."""
    texts: bytes | None = None
    """The json member, if no file holds it."""

    def read(self, suffix: str) -> bytes | None:
        """A member's bytes, or None if the sample has no such member.

        Raises:
            SampleError: the file cannot be opened, or was truncated after it was indexed.
        """
        if suffix not in self.members:
            return self.texts if suffix == TEXT_SUFFIX else None
        size = self.members[suffix][2]
        with self.open(suffix) as file:
            data = file.read(size)
        if len(data) < size:
            raise SampleError("damaged_shard", self.shard, self.key, suffix, f"{len(data)} of {size} bytes are there")
        return data

    def open(self, suffix: str) -> BinaryIO:
        """The file that holds a member, at the member's offset."""
        path, offset, _ = self.members[suffix]
        try:
            file = open(path, "rb")  # noqa: SIM115
        except (OSError, ValueError) as error:
            reason: SampleReason = "missing_field" if suffix == TEXT_SUFFIX else "unreadable_video"
            raise SampleError(reason, self.shard, self.key, suffix, f"{path}: {error}") from error
        file.seek(offset)
        return file

    def load(self) -> Sample:
        """Read and check all members."""
        names = [*self.members, *([TEXT_SUFFIX] if self.texts is not None else [])]
        return parse_sample({name: self.read(name) or b"" for name in names}, self.shard, self.key)


def list_shards(folder: str | Path) -> list[Path]:
    """Tar files and lists of a folder, sorted by name, and the folder itself if it holds videos but no list.

    A list (.csv or .jsonl) stands for itself.  If there is nothing of these, a DataError names the folder.
    """
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
    """A split's folder, or else the list of its name; the folder if there is neither."""
    lists = [base / f"{split}{suffix}" for suffix in LIST_SUFFIXES]
    return base / split if (base / split).is_dir() else next((path for path in lists if path.is_file()), base / split)


def index_folder(folder: str | Path) -> Scan:
    """Index everything that :func:`list_shards` lists."""
    scans = [scan_shard(path) for path in list_shards(folder)]
    return [ref for refs, _ in scans for ref in refs], [error for _, errors in scans for error in errors]


def scan_shard(path: str | Path) -> Scan:
    """Index one entry of :func:`list_shards`; damage never raises, it is returned as errors."""
    path = Path(path)
    if path.is_dir():
        return _scan_files(path)
    return _scan_list(path) if path.suffix in LIST_SUFFIXES else _scan_tar(str(path))


def walk_files(folder: Path) -> Iterator[Path]:
    """Files below a folder that may be samples' members, sorted by name within each folder."""
    for home, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(home) / name
            if not name.startswith(".") and name != MANIFEST and path.suffix.lower() not in (".tar", *LIST_SUFFIXES):
                yield path


def _split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix in lower case) of a member's name; None if it has no key or no suffix."""
    match = _NAME.match(name)
    return None if match is None else (match.group(1), match.group(2).lower())


# --------------------------------------------------------------- tar shards


def _scan_tar(shard: str) -> Scan:
    refs: dict[str, SampleRef] = {}
    errors: list[SampleError] = []
    broken: set[str] = set()
    last = None
    for name, offset, size, problem in _tar_members(shard):
        if name is None:
            errors.append(SampleError("damaged_shard", shard, None, None, problem))
            continue
        parts = _split_name(name)
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
            ref.members[suffix] = (shard, offset, size)
        last = key
    return [ref for key, ref in refs.items() if key not in broken], errors


def _tar_members(shard: str) -> Iterable[tuple[str | None, int, int, str | None]]:
    """Yield (name, offset, size, problem) of each file; without a name the problem is the whole shard's."""
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
    # tarfile takes garbage between members, or the end of a truncated file, for the archive's end
    with open(shard, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if not block:
        yield None, 0, 0, "no end-of-archive mark: the shard is cut off"
    elif block.strip(b"\0"):
        yield None, 0, 0, f"no tar header at byte {end}"


# ---------------------------------------------------------- files and lists


def _scan_files(folder: Path) -> Scan:
    """Files whose names are equal up to the first dot are a sample's members."""
    found: dict[str, dict[str, str]] = {}
    errors: dict[str, SampleError] = {}
    for path in walk_files(folder):
        parts = _split_name(path.name)
        if parts is None:
            continue
        below = path.parent.relative_to(folder).parts
        key = "/".join([*(name.replace(".", "_") for name in below), parts[0]])
        members = found.setdefault(key, {})
        if parts[1] in members:
            errors[key] = SampleError("duplicate_member", str(folder), key, parts[1], f"{members[parts[1]]}, {path}")
        members[parts[1]] = str(path)
    refs = [
        SampleRef(str(folder), key, {suffix: (file, 0, -1) for suffix, file in members.items()})
        for key, members in found.items()
        if key not in errors and members.keys() & {TEXT_SUFFIX, *VIDEO_SUFFIXES}  # others are no samples at all
    ]
    return refs, list(errors.values())


def _scan_list(path: Path) -> Scan:
    """Rows of a list; their keys count from 0.  No video is opened."""
    refs: list[SampleRef] = []
    errors: list[SampleError] = []
    number = 0
    try:
        for number, row in enumerate(read_rows(path), 1):
            try:
                refs.append(_row_ref(path, f"{number - 1:08d}", row))
            except SampleError as error:
                errors.append(error)
    except DataError as error:
        errors.append(SampleError("damaged_shard", str(path), None, None, f"after {number} rows: {error}"))
    return refs, errors


def _row_ref(path: Path, key: str, row: Row) -> SampleRef:
    if row.error is not None:
        raise SampleError(row.reason, str(path), key, TEXT_SUFFIX, row.error)
    fields, texts = dict(row.fields), None
    if row.span is None:
        with suppress(ValueError, KeyError):  # a column of that name may hold anything
            fields["scene"] = json.loads(fields["scene"])
        try:
            if "qa" in fields:
                fields["qa"] = json.loads(fields["qa"])
        except ValueError as error:
            raise SampleError("corrupt_json", str(path), key, "qa", f"{row.where}: {error}") from error
        texts = json.dumps(fields).encode()
    if "video" not in fields:
        raise SampleError("missing_field", str(path), key, "video", f"{row.where}: the row holds {sorted(fields)}")
    video = fields["video"]
    if not isinstance(video, str) or not video or "\0" in video:
        raise SampleError("wrong_type", str(path), key, "video", f"{row.where}: expected a path, got {video!r}")
    suffix = Path(video).suffix[1:].lower()
    suffix = suffix if suffix in VIDEO_SUFFIXES else VIDEO_SUFFIXES[0]  # a listed video may have any suffix
    members = {suffix: (str(path.parent / video), 0, -1)}
    if row.span is not None:
        members[TEXT_SUFFIX] = (str(path), *row.span)
    return SampleRef(str(path), key, members, texts=texts)
