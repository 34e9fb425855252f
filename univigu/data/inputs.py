"""Inputs of ``lightning predict``: videos to caption, prompts to generate from, or pairs of a video and a text.

Every input gives a row; one that cannot be used gives a row with an error.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from univigu.data.buckets import Bucket
from univigu.data.index import walk
from univigu.data.rows import READERS, Row, make_row, read_rows
from univigu.data.sample import VIDEO_SUFFIXES, DataError, is_unicode, is_video
from univigu.data.video import VideoError, read_video
from univigu.models.tokens import MAX_CHARACTERS, TextTooLongError, tokenize

PredictTask = Literal["caption", "generate", "joint", "edit", "qa"]
INPUTS = dict(caption="videos", generate="prompts", joint="prompts", edit="pairs", qa="pairs")
"""The option of the data module that a task reads its inputs from."""
TextField = Literal["prompt", "question"]
DEFAULT_STRENGTH = 0.8
MAX_QUESTIONS = 16
"""Most questions about a video that are answered together."""


Input = tuple[dict[str, Any], str | None]
"""The fields of a result's row that are inputs, and why they cannot be used.

The fields are "prompt"; or "video", and a "question" about it; or of an edit "source" (a video), "prompt" (None: the
model's own), "strength" (how far back towards noise it starts) and "replace" (words of the prompt).
"""


def find_inputs(given: dict[str, Any], task: PredictTask | None) -> list[Input]:
    """The inputs in the one option (videos, prompts or pairs) that is not None, which must be the task's."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        found = " and ".join(names) + " are" if names else "none is"
        raise DataError(f"data.videos, data.prompts, data.pairs: prediction needs one of them, {found} given")
    (name,) = names
    if task is not None and name != INPUTS[task]:
        raise DataError(f"model.predict_task={task!r} needs data.{INPUTS[task]}, not data.{name}")
    if name == "videos":
        return [({"video": path}, None) for path in find_videos(given[name])]
    if name == "pairs":
        return read_pairs(given[name], "question" if task == "qa" else "prompt")
    return [({"prompt": text}, error) for text, error in read_prompts(given[name])]


def find_videos(value: str | list[str]) -> list[str]:
    """Paths of the videos that a file, a folder (with those below), a glob pattern, or a list of these names.

    Those of one folder or pattern are sorted; a list keeps its order; duplicates are dropped.  A file may have any
    suffix; folders are searched for video suffixes.  A value that matches no file is a DataError.
    """
    values = [value] if isinstance(value, str) else value
    if not values:
        raise DataError("data.videos=[]: expected at least one file, folder or pattern")
    paths: dict[str, None] = {}
    for item in values:
        path = Path(item)
        if path.is_dir():
            found = [str(file) for file in walk(path) if is_video(file) and file.is_file()]
            if not found:
                raise DataError(f"data.videos={item!r}: the folder holds no {', '.join(VIDEO_SUFFIXES)} file")
        elif path.is_file():
            found = [item]
        else:
            found = _matches(path)
            if not found:
                raise DataError(f"data.videos={item!r}: no such file or folder, and nothing matches it as a pattern")
        paths.update(dict.fromkeys(found))
    return list(paths)


def _matches(pattern: Path) -> list[str]:
    """Files that match a pattern; existing folders that it begins with, such as "raw [1080p]", mean themselves."""
    folder = next(parent for parent in pattern.parents if parent.is_dir())
    names = glob.glob(str(pattern.relative_to(folder)), root_dir=folder, recursive=True)
    files: dict[str, str] = {}
    for name in sorted(names, key=len):  # links to folders above them give the same files many times
        files.setdefault(os.path.realpath(folder / name), str(folder / name))
    return sorted(path for path in files.values() if Path(path).is_file())


def read_prompts(value: str | list[str]) -> list[tuple[str, str | None]]:
    """(prompt, error) of each row of a file (a line of .txt, else the field "prompt"), of a prompt, or of a list.

    What looks like a path is never a prompt: what exists or ends in a list's suffix.  A file that cannot be read or
    holds no prompt is a DataError.
    """
    rows: list[Row] = []
    for item in [value] if isinstance(value, str) else value:
        is_path = os.path.exists(item) or Path(item).suffix.lower() in READERS
        rows += read_list(item, "data.prompts") if is_path else [Row("data.prompts", {"prompt": item})]
    if not rows:
        raise DataError(f"data.prompts={value!r}: holds no prompt")
    return [text_of(row, "prompt") for row in rows]


def read_list(path: str, name: str) -> list[Row]:
    """Rows of a file that an option names; one that cannot be read or holds none is a DataError about the option."""
    try:
        rows = list(read_rows(path))
    except DataError as error:
        raise DataError(f"{name}={path!r}: {str(error).removeprefix(f'{path}: ')}") from error
    if not rows:
        raise DataError(f"{name}={path!r}: holds no row")
    return rows


def read_pairs(value: str | dict[str, Any] | list[dict[str, Any]], field: TextField) -> list[Input]:
    """Videos with their texts of a file (.jsonl, .csv, ...), of one object, or of a list of objects.

    An object is ``{"video": ..., "question": ...}``, or for an edit ``{"video": ..., "prompt": ..., "replace": {"red":
    "blue"}, "strength": 0.8}`` with at least one of prompt and replace.  Its video is a value for ``find_videos``,
    relative to the working directory: a folder or pattern gives several pairs.  No pair, or a file that cannot be read,
    is a DataError.
    """
    if isinstance(value, str):
        rows = read_list(value, "data.pairs")
    else:
        objects = [value] if isinstance(value, dict) else value
        rows = [make_row(f"data.pairs[{number}]", item) for number, item in enumerate(objects)]
    pairs = [pair for row in rows for pair in _pairs_of(row, field)]
    if not pairs:
        raise DataError(f"data.pairs={value!r}: holds no pair of a video and a {field}")
    return pairs


def text_of(row: Row, field: str) -> tuple[str, str | None]:
    """The text, and why it cannot be used."""
    text = row.fields.get(field)
    if row.error is not None or not isinstance(text, str):
        return "", row.error or f"{row.where}: expected a string {field!r}, got {text!r:.80}"
    if len(text) > MAX_CHARACTERS:
        return text[:80], f"{row.where}: a {field} of {len(text)} characters, over {MAX_CHARACTERS}"
    if not text.strip():
        return text, f"{row.where}: an empty {field}"
    return text, None if is_unicode(text) else f"{row.where}: {field!r} is no valid Unicode: {text!r}"


def _pairs_of(row: Row, field: TextField) -> list[Input]:
    """The pairs of one row, one for each video that it names."""
    name, options = ("source", ["replace", "strength"]) if field == "prompt" else ("video", [])
    video, error = text_of(row, "video")
    text: str | None = None
    if row.fields.get(field) is not None or "replace" not in row.fields:  # else the prompt is the model's
        text, text_error = text_of(row, field)
        error = error or text_error
    if error is None:
        allowed = [field, *options, "video"]
        try:
            if unknown := sorted(row.fields.keys() - set(allowed)):
                raise DataError(f"unknown field {unknown[0]!r}, expected {allowed}")
            values = _edit_options(row.fields) if options else {}
            return [({name: path, field: text, **values}, None) for path in find_videos(video)]
        except DataError as failure:
            error = f"{row.where}: {failure}"
    return [({name: video, field: text, **dict.fromkeys(reversed(options))}, error)]


def _edit_options(fields: dict[str, Any]) -> dict[str, Any]:
    """The strength of an edit and the words that it replaces."""
    strength, value, words = None, fields.get("strength"), fields.get("replace")
    texts = [text for item in words.items() for text in item] if isinstance(words, dict) else []
    if words is not None and not (texts and all(isinstance(text, str) and is_unicode(text) for text in texts)):
        raise DataError(f'replace={words!r}: expected words and what replaces them, such as {{"red": "blue"}}')
    value = DEFAULT_STRENGTH if value in (None, "") else value
    with suppress(TypeError, ValueError):
        strength = float(value)
    if strength is None or not 0 < strength <= 1:
        raise DataError(f"strength={value!r}: expected over 0, at most 1")
    return {"strength": strength, "replace": words}


class PredictionInputs(Dataset[tuple[list[int], list[str | None], torch.Tensor | None]]):
    """The inputs (all with a video, or all with a prompt only), decoded and checked; see ``collate``.

    An item has one input, or up to ``MAX_QUESTIONS`` questions about a video, which is read once: the inputs' numbers,
    their errors, and the video's frames.
    """

    def __init__(
        self, inputs: Sequence[Input], size: Bucket, tokenizer: PreTrainedTokenizerBase, prompt_length: int
    ) -> None:
        self.inputs, self.size, self.tokenizer, self.prompt_length = inputs, size, tokenizer, prompt_length
        self.videos: list[str | None] = [row.get("source", row.get("video")) for row, _ in inputs]
        groups: dict[Any, list[int]] = {}
        for index, (row, _) in enumerate(inputs):
            groups.setdefault(row["video"] if "question" in row else index, []).append(index)
        self.groups = [
            group[start : start + MAX_QUESTIONS]
            for group in groups.values()
            for start in range(0, len(group), MAX_QUESTIONS)
        ]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> tuple[list[int], list[str | None], torch.Tensor | None]:
        indices, frames = self.groups[number], None
        errors = [self._error_of(*self.inputs[index]) for index in indices]
        video = self.videos[indices[0]]
        if video is not None and None in errors:
            try:
                frames = read_video(video, self.size.num_frames, self.size.height, self.size.width)
            except VideoError as failure:
                errors = [error or str(failure) for error in errors]
        return indices, errors, frames

    def _error_of(self, row: dict[str, Any], error: str | None) -> str | None:
        text = row.get("question", row.get("prompt"))
        try:
            if error is None and text is not None:
                tokenize(self.tokenizer, [text], self.prompt_length)
        except TextTooLongError as failure:
            return str(failure)
        return error

    def collate(self, items: list[tuple[list[int], list[str | None], torch.Tensor | None]]) -> dict[str, Any]:
        """A batch: lists ``index``, ``row``, ``error`` and ``clip`` of all inputs.

        With videos it has ``video``, uint8 [n, F, C, H, W] of those that can be used; ``clip`` are their numbers.
        """
        batch: dict[str, Any] = {"index": [], "row": [], "error": [], "clip": []}
        videos = list[torch.Tensor]()
        for indices, errors, frames in items:
            batch["index"] += indices
            batch["row"] += [self.inputs[index][0] for index in indices]
            batch["error"] += errors
            batch["clip"] += [len(videos)] * len(indices)
            videos += [] if frames is None else [frames]
        if self.videos[0] is not None:
            none = torch.zeros(0, self.size.num_frames, 3, self.size.height, self.size.width, dtype=torch.uint8)
            batch["video"] = torch.stack(videos) if videos else none
        return batch
