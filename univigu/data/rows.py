"""Rows of tables: one reader of .jsonl, .json, .csv, .parquet and .txt files, and a writer of JSON Lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from univigu.data.sample import DataError, is_unicode

MAX_FIELD = 2**17
"""Most characters of a field of a .csv file; a longer one is a quote that is never closed, not a text."""
_LINE_ENDS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
"""Characters that some readers take for a line end, though JSON does not; inside JSON strings they may be escaped."""


@dataclass(frozen=True)
class Row:
    """Values by column, or an error; ``where`` is file and line (of .json and .parquet: row), counted from 1."""

    where: str
    fields: dict[str, Any]
    error: str | None = None


def make_row(where: str, value: Any) -> Row:
    """A row of an object; of anything else a row with an error."""
    if not isinstance(value, dict):
        return Row(where, {}, f"{where}: expected an object, got {str(value)[:80]}")
    return Row(where, value)


def read_rows(path: str | Path) -> Iterator[Row]:
    """Rows of a file, without blank lines; a row that is no object comes as a row with an error.

    A .csv file has a header; if that is one column, commas need no quotes.  Lines of a .txt file and strings in a .json
    file are values of the field ``prompt``.  A file that cannot be read, or is not of its kind, is a DataError.
    """
    path = Path(path)
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: expected a file of {', '.join(READERS)}")
    try:
        yield from read(path)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # the last for deep nesting and parquet's rarer codecs
        raise DataError(f"{path}: cannot be read ({error})") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig")
                if text.strip():
                    yield make_row(where, json.loads(text))
            except (ValueError, RecursionError) as error:  # no text or JSON, or nested too deep
                yield Row(where, {}, f"{where}: not JSON ({error})")


def _read_json(path: Path) -> Iterator[Row]:
    values = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a list, got {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield make_row(f"{path}:{number}", {"prompt": value} if isinstance(value, str) else value)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader, header, where = csv.reader(file, strict=True), list[str](), f"{path}:1"
        try:
            for cells in reader:
                if cells and not header:
                    header = cells
                elif cells and len(header) == 1:  # commas separate nothing
                    yield Row(where, {header[0]: ",".join(cells)})
                elif cells and len(cells) == len(header):
                    yield Row(where, dict(zip(header, cells, strict=True)))
                elif cells:
                    yield Row(where, {}, f"{where}: {len(cells)} fields, the header has {len(header)}")
                where = f"{path}:{reader.line_num + 1}"
        except csv.Error as error:
            raise DataError(f"{where}: a quote is not closed, or a field is too long ({error})") from error


def _read_txt(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Row(f"{path}:{number}", {"prompt": line.strip()})


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    with pyarrow.parquet.ParquetFile(path) as file:
        values = (value for batch in file.iter_batches() for value in batch.to_pylist())
        for number, value in enumerate(values, 1):
            yield Row(f"{path}:{number}", value)


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_txt}


def to_json(value: Any, indent: int | None = None) -> str:
    """Readable JSON in UTF-8; ASCII with escapes if a string is not valid Unicode (such as a file name)."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text if is_unicode(text) else json.dumps(value, indent=indent)


def to_line(row: Any) -> str:
    """JSON and a newline; every other character that could end a line is escaped."""
    return to_json(row).translate(_LINE_ENDS) + "\n"
