"""Videos with a text to each: what ``lightning predict`` edits (a prompt) or answers about (a question)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from univigu.data.inputs import VideoInputs, find_videos
from univigu.data.jsonl import is_unicode, split_lines
from univigu.data.sample import DataError
from univigu.models.tokens import TextTooLongError, tokenize

TextField = Literal["prompt", "question"]


@dataclass(frozen=True)
class Pair:
    """A video and its text, or why it is none."""

    video: str
    text: str
    strength: float | None = None
    """How far back towards noise an edit starts; None for a question."""
    error: str | None = None


def read_pairs(
    value: str | dict[str, Any] | list[dict[str, Any]],
    field: TextField,
    strength: float,
    name: str = "data.pairs",
) -> list[Pair]:
    """Pairs of a .jsonl file (an object a line), a .csv file (with a header), one object, or a list of them.

    An object is ``{"video": ..., "prompt": ..., "strength": ...}``, the strength being optional, or ``{"video": ...,
    "question": ...}``.  Its video may be whatever :func:`find_videos` takes: a folder or pattern gives a pair for each
    file.  An object that is something else comes through as an error.

    Args:
        value: see above; paths in a file are relative to the working directory, as everywhere.
        field: what the text is called.
        strength: that of objects without one, in (0, 1].
        name: the option that errors are reported under.

    Raises:
        DataError: the file is missing or not of its kind, or there is no pair at all.
    """
    rows = _file_rows(value, name) if isinstance(value, str) else _object_rows(value, name)
    pairs = [pair for where, row in rows for pair in _pairs_of(row, field, strength, where)]
    if not pairs:
        raise DataError(f"{name}={value!r}: holds no pair of a video and a {field}")
    return pairs


def _object_rows(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    for i, row in enumerate([value] if isinstance(value, dict) else value):
        yield f"{name}[{i}]", row


def _file_rows(path: str, name: str) -> Iterator[tuple[str, Any]]:
    """(where, object) of a file's rows; the object is a DataError where a line holds none."""
    if not path.endswith((".jsonl", ".csv")):
        raise DataError(f"{name}={path!r}: expected a .jsonl or .csv file, or objects with a video and its text")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}={path!r}: cannot be read ({error})") from error
    if path.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            yield f"{path}:{reader.line_num}", {key: cell for key, cell in row.items() if cell not in (None, "")}
        return
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                yield where, DataError(f"{where}: not JSON ({error})")


def _pairs_of(row: Any, field: TextField, default: float, where: str) -> list[Pair]:
    """The pairs of one object, one for each video that it names."""
    if isinstance(row, DataError):
        return [Pair("", "", error=str(row))]
    if not isinstance(row, dict):
        return [Pair("", "", error=f"{where}: expected an object, got {str(row)[:80]}")]
    video, text = row.get("video"), row.get(field)
    pair = Pair(video if isinstance(video, str) else "", text if isinstance(text, str) else "")
    for key, value in (("video", video), (field, text)):
        if not isinstance(value, str) or not value.strip():
            return [replace(pair, error=f"{where}: expected a non-empty string {key!r}, got {value!r}")]
    if not is_unicode(pair.text):
        return [replace(pair, error=f"{where}: {field!r} is no valid Unicode: {pair.text!r}")]
    allowed = {"video", field} | ({"strength"} if field == "prompt" else set())
    if unknown := sorted(map(str, row.keys() - allowed)):
        return [replace(pair, error=f"{where}: {unknown[0]!r} is no field of it; it has {sorted(allowed)}")]
    if field == "prompt":
        try:
            pair = replace(pair, strength=check_strength(row.get("strength", default), where))
        except DataError as error:
            return [replace(pair, error=str(error))]
    try:
        return [replace(pair, video=path) for path in find_videos(pair.video)]
    except DataError as error:
        return [replace(pair, error=f"{where}: {error}")]


def check_strength(value: Any, where: str) -> float:
    """The value as a number in (0, 1]; a DataError otherwise."""
    try:
        strength = float(value)
    except (TypeError, ValueError):
        strength = 0.0
    if not 0 < strength <= 1:
        raise DataError(f"{where}: strength={value!r}: expected over 0, at most 1")
    return strength


class PairInputs(VideoInputs):
    """Videos with a text to each; a video that cannot be read, or a text that does not fit, gives a row with an error.

    Args:
        pairs: of :func:`read_pairs`.
        num_frames, height, width: size that the videos are brought to.
        tokenizer: of the foundation.
        prompt_length: slot of the texts in tokens.
    """

    def __init__(
        self,
        pairs: list[Pair],
        num_frames: int,
        height: int,
        width: int,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
    ) -> None:
        super().__init__([pair.video for pair in pairs], num_frames, height, width)
        self.pairs, self.tokenizer, self.prompt_length = pairs, tokenizer, prompt_length

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        error = pair.error
        if error is None:
            try:
                tokenize(self.tokenizer, [pair.text], self.prompt_length)
            except TextTooLongError as too_long:
                error = str(too_long)
        if error is None:
            row = super().__getitem__(index)
        else:
            row = {"index": index, "path": pair.video, "video": None, "error": error}
        return {**row, "text": pair.text, "strength": pair.strength}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """As :meth:`VideoInputs.collate`, and ``text``, ``strength`` of all rows."""
        return {**super().collate(rows), **{name: [row[name] for row in rows] for name in ("text", "strength")}}
