"""Samples that lie in files of their own: folders of videos with their texts beside them, and lists of paths.

A folder holds ``name.mp4`` and ``name.json`` as a shard would. A list is a ``.jsonl`` file, an object a row, or a
``.csv`` file with a header; ``video`` is the path, relative to the list's folder, and the rest is what a sample's json
holds.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from univigu.data.sample import TEXT_SUFFIX, VIDEO_SUFFIXES, SampleError
from univigu.data.shards import LIST_SUFFIXES, MANIFEST, SampleRef, split_name

WHOLE = (0, -1)
"""Offset and size of a member that is a file of its own."""
_BOM = b"\xef\xbb\xbf"
Found = tuple[list[SampleRef], list[SampleError]]


def walk_files(folder: Path) -> Iterator[Path]:
    """The files of a folder and those below that may be samples' members, in the order of their names."""
    for home, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(home) / name
            if not name.startswith(".") and name != MANIFEST and path.suffix.lower() not in (".tar", *LIST_SUFFIXES):
                yield path


def scan_files(folder: Path) -> Found:
    """Index a folder's files: those whose names differ only after the first dot are a sample's members.

    Returns:
        the samples, in the order of their names, and what is wrong with others.
    """
    found: dict[str, dict[str, str]] = {}
    errors: dict[str, SampleError] = {}
    for path in walk_files(folder):
        parts = split_name(path.name)
        if parts is None:
            continue
        below = path.parent.relative_to(folder).parts
        key = "/".join([*(name.replace(".", "_") for name in below), parts[0]])
        members = found.setdefault(key, {})
        if parts[1] in members:
            errors[key] = SampleError("duplicate_member", str(folder), key, parts[1], f"{members[parts[1]]}, {path}")
        members[parts[1]] = str(path)
    refs = [
        SampleRef(str(folder), key, dict.fromkeys(members, WHOLE), files=members)
        for key, members in found.items()
        if key not in errors and members.keys() & {TEXT_SUFFIX, *VIDEO_SUFFIXES}  # others are no samples at all
    ]
    return refs, list(errors.values())


def scan_list(path: Path) -> Found:
    """Index a list's rows; their keys are their numbers, from 0. Nothing of a video is looked at."""
    rows = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
    refs: list[SampleRef] = []
    errors: list[SampleError] = []
    number = 0
    try:
        for number, (row, place, texts) in enumerate(rows):
            try:
                refs.append(_row_ref(path, f"{number:08d}", row, place, texts))
            except SampleError as error:
                errors.append(error)
    except (csv.Error, UnicodeDecodeError) as error:
        errors.append(SampleError("damaged_shard", str(path), None, None, f"after {number} rows: {error}"))
    return refs, errors


def _row_ref(path: Path, key: str, row: Any, place: tuple[int, int], texts: bytes | None) -> SampleRef:
    if isinstance(row, ValueError):
        raise SampleError("corrupt_json", str(path), key, TEXT_SUFFIX, str(row))
    if not isinstance(row, dict) or None in row:
        found = "more cells than the header has" if isinstance(row, dict) else f"got {type(row).__name__}"
        raise SampleError("wrong_type", str(path), key, TEXT_SUFFIX, f"expected an object, {found}")
    if "video" not in row:
        raise SampleError("missing_field", str(path), key, "video", f"the row holds {sorted(row)}")
    video = row["video"]
    if not isinstance(video, str) or not video or "\0" in video:
        raise SampleError("wrong_type", str(path), key, "video", f"expected a path, got {video!r}")
    suffix = Path(video).suffix[1:].lower()
    suffix = suffix if suffix in VIDEO_SUFFIXES else VIDEO_SUFFIXES[0]  # named outright, it may have any
    members = {suffix: WHOLE, TEXT_SUFFIX: place}
    return SampleRef(str(path), key, members, files={suffix: str(path.parent / video)}, texts=texts)


def _json_rows(path: Path) -> Iterator[tuple[Any, tuple[int, int], None]]:
    """(object or why it is none, where its text lies, None) of each row that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            start, offset = offset, offset + len(line)
            if start == 0 and line.startswith(_BOM):
                start, line = len(_BOM), line[len(_BOM) :]
            if not line.strip():
                continue
            row: Any
            try:
                row = json.loads(line.decode())
            except ValueError as error:  # of the decoder, too
                row = ValueError(str(error))
            yield row, (start, len(line)), None


def _csv_rows(path: Path) -> Iterator[tuple[Any, tuple[int, int], bytes]]:
    """(cells by column, nowhere, the texts as JSON) of each row; empty cells are left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for cells in csv.DictReader(file):
            row: Any = {name: cell for name, cell in cells.items() if cell not in (None, "")}
            if "scene" in row:
                with suppress(ValueError):  # one of the user's own may be anything
                    row["scene"] = json.loads(row["scene"])
            try:
                if "qa" in row:
                    row["qa"] = json.loads(row["qa"])
            except ValueError as error:
                row = ValueError(str(error))
            texts = row if isinstance(row, dict) and None not in row else {}
            yield row, WHOLE, json.dumps(texts).encode()
