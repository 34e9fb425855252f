"""Indexes samples for random access: members of tar shards, plain files in folders, and rows of lists.

A shuffle is then a permutation and resuming exactly a position in it, which a sequential stream cannot give.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from univigu.data.rows import Row, read_rows
from univigu.data.sample import TEXT_SUFFIX, VIDEO_SUFFIXES, DataError, SampleError, SampleRef, is_video
from univigu.data.shards import MANIFEST

log = logging.getLogger(__name__)
_warn_once = cache(log.warning)

LIST_SUFFIXES = (".csv", ".jsonl")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Compressed ones count as damaged shards: they cannot be read at an offset."""
Scan = tuple[list[SampleRef], list[SampleError]]
"""Usable samples in order, and errors of the others."""


def walk(folder: Path) -> list[Path]:
    """Files in a folder and below, sorted, without manifests and what is hidden; links to folders are followed."""
    files, hidden, seen = list[Path](), 0, set[str]()
    for home, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(home)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        for path in (Path(home, name) for name in sorted(names)):
            if path.name.startswith("."):
                hidden += is_video(path) or path.name.lower().endswith((*TARS, *LIST_SUFFIXES))
            elif path.name != MANIFEST:
                files.append(path)
    if hidden:
        _warn_once("%s: %d hidden videos, shards or lists are left out", folder, hidden)
    return files


def find_split(base: Path, split: str) -> Path:
    """A split's folder, or else the list of its name; the folder if there is neither."""
    paths = [base / split, *(base / f"{split}{suffix}" for suffix in LIST_SUFFIXES)]
    return next((path for path in paths if path.exists()), paths[0])


def list_shards(folder: str | Path) -> list[Path]:
    """Tar files in a folder and below and lists in it, sorted by path, and the folder itself if it holds videos.

    If there is a list, videos are used only as it says.  A list may be given in place of a folder.  A folder with
    nothing of these is a DataError.
    """
    folder = Path(folder)
    if folder.is_file() and folder.suffix.lower() in LIST_SUFFIXES:
        return [folder]
    if not folder.is_dir():
        problem = f"{folder}: no such folder of shards, and no such list ({folder.name}.csv or .jsonl)"
        raise DataError(f"{problem}; tools/synthesize.py makes shards, docs/DATA.md tells their form")
    files = walk(folder)
    lists = [path for path in files if path.suffix.lower() in LIST_SUFFIXES and path.parent == folder]
    shards = sorted(lists + [path for path in files if path.name.lower().endswith(TARS)])
    if not lists and any(map(is_video, files)):
        shards.append(folder)
    if not shards:
        raise DataError(f"{folder}: holds no .tar shard, no .csv or .jsonl list, and no video")
    return shards


def index_folder(folder: str | Path) -> Scan:
    """Index everything that ``list_shards`` lists."""
    scans = [scan_shard(path) for path in list_shards(folder)]
    return [ref for refs, _ in scans for ref in refs], [error for _, errors in scans for error in errors]


def scan_shard(path: str | Path) -> Scan:
    """Index one entry of ``list_shards``; damage never raises, it is returned as errors."""
    path = Path(path)
    if path.is_dir():
        return _scan_files(path)
    return _scan_list(path) if path.suffix.lower() in LIST_SUFFIXES else _scan_tar(str(path))


def _key(name: str) -> str:
    """A key that webdataset does not split."""
    return name.removeprefix("./").replace(".", "_")


def _scan_tar(shard: str) -> Scan:
    """Members of a tar; the key ends at the first dot of the file name, which is webdataset's rule."""
    refs: dict[str, SampleRef] = {}
    errors: dict[str | None, SampleError] = {}
    last, total = None, os.path.getsize(shard)
    try:
        for member in _tar_members(shard):
            home, slash, file = member.name.rpartition("/")
            stem, dot, suffix = file.partition(".")
            if not member.isfile() or not stem or not dot:
                continue  # webdataset ignores such files too
            key, suffix = _key(f"{home}{slash}{stem}"), suffix.lower()
            ref = refs.setdefault(key, SampleRef(shard, key, {}))
            missing = member.offset_data + member.size - total
            if missing > 0:
                errors[key] = ref.error("damaged_shard", suffix, f"the shard ends {missing} bytes too early")
                break
            if suffix in ref.members:
                errors.setdefault(key, ref.error("duplicate_member", suffix, f"member {member.name!r}"))
            elif ref.members and key != last:
                value = f"member {member.name!r} comes after other samples; sort the members of the tar by name"
                errors.setdefault(key, ref.error("duplicate_member", suffix, value))
            ref.members.setdefault(suffix, (shard, member.offset_data, member.size))
            last = key
    except tarfile.ReadError as error:
        compressed = "a compressed tar; decompress it, since samples are read at their offsets"
        value = str(error) if shard.lower().endswith(".tar") else compressed
        errors[None] = SampleError("damaged_shard", shard, None, None, value)
    return [ref for key, ref in refs.items() if key not in errors], list(errors.values())


def _tar_members(shard: str) -> Iterator[tarfile.TarInfo]:
    """The tar's members; raises ReadError if it is damaged between them or has no end."""
    with tarfile.open(shard, "r:") as tar:
        yield from iter(tar.next, None)
        end = tar.offset
    # tarfile takes garbage between members, or the end of a truncated file, for the archive's end
    with open(shard, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if not block:
        raise tarfile.ReadError("no end-of-archive mark: the shard is cut off")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no tar header at byte {end}")


def plain_files(folder: Path) -> list[Path]:
    """Videos and json files in a folder and below."""
    return [path for path in walk(folder) if is_video(path) or path.suffix.lower() == f".{TEXT_SUFFIX}"]


def _scan_files(folder: Path) -> Scan:
    """Files whose paths are equal but for the last suffix are a sample's members."""
    refs: dict[str, SampleRef] = {}
    errors: dict[str, SampleError] = {}
    first: dict[str, Path] = {}
    for path in plain_files(folder):
        key, suffix = _key(path.relative_to(folder).with_suffix("").as_posix()), path.suffix[1:].lower()
        ref = refs.setdefault(key, SampleRef(str(folder), key, {}))
        if suffix in ref.members or first.setdefault(key, path).with_suffix("") != path.with_suffix(""):
            errors[key] = ref.error("duplicate_member", suffix, f"{first[key]}, {path}")
        ref.members[suffix] = (str(path), 0, -1)
    return [ref for key, ref in refs.items() if key not in errors], list(errors.values())


def _scan_list(path: Path) -> Scan:
    """Rows of a list; their keys count from 0.  No video is opened."""
    refs, errors, number = list[SampleRef](), list[SampleError](), 0
    try:
        for number, row in enumerate(read_rows(path), 1):
            ref = SampleRef(str(path), f"{number - 1:08d}", {})
            try:
                ref.members.update(_row_members(ref, path, row))
                refs.append(ref)
            except SampleError as error:
                errors.append(error)
    except DataError as error:
        errors.append(SampleError("damaged_shard", str(path), None, None, f"after {number} rows: {error}"))
    return refs, errors


def _row_members(ref: SampleRef, path: Path, row: Row) -> dict[str, Any]:
    """The video that a row names, relative to the list, and the row as json member."""
    if row.error is not None:
        raise ref.error("corrupt_row", TEXT_SUFFIX, row.error)
    fields = dict(row.fields)
    for name in ("qa", "scene"):  # JSON in the cells of a .csv file
        if isinstance(cell := fields.get(name), str):
            try:
                fields[name] = json.loads(cell or "null")
            except ValueError as error:
                if name == "qa":  # a column that is called scene may hold anything
                    raise ref.error("corrupt_json", name, f"{row.where}: {error}") from error
    video = fields.get("video")
    if not isinstance(video, str) or not video or "\0" in video:
        raise ref.error("wrong_type", "video", f"{row.where}: expected a path, got {video!r}")
    # a listed video may have any suffix
    return {VIDEO_SUFFIXES[0]: (str(path.parent / video), 0, -1), TEXT_SUFFIX: json.dumps(fields).encode()}
