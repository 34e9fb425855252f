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
DEFAULT_STRENGTH = 0.8
MAX_QUESTIONS = 16
"""Most questions about a video that are answered together."""
Input = tuple[dict[str, Any], str | None]
"""The fields of a result's row that are inputs, and why they cannot be used.

The fields are "prompt"; or "video", and a "question" about it; or of an edit "source" (a video), "prompt" (None: the
model's own), "strength" (how far back towards noise it starts) and "replace" (words of the prompt).
"""


def find_inputs(given: dict[str, Any], task: PredictTask | None) -> list[Input]:
    """The inputs in the one option (videos, prompts or pairs) that is not None, which must be the task's.

    What looks like a path is never a prompt: what exists or ends in a list's suffix.

    Pairs are a file, an object, or a list of objects: ``{"video": ..., "question": ...}``, or for an
    edit ``{"video": ..., "prompt": ..., "replace": {"red": "blue"}, "strength": 0.8}`` with at least one of prompt and
    replace.  The video is a value for ``find_videos``, relative to the working directory: a folder or pattern gives
    several pairs.

    A file that cannot be read or holds no row is a DataError.
    """
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        found = " and ".join(names) + " are" if names else "none is"
        raise DataError(f"data.videos, data.prompts, data.pairs: prediction needs one of them, {found} given")
    (name,) = names
    if task is not None and name != INPUTS[task]:
        raise DataError(f"model.predict_task={task!r} needs data.{INPUTS[task]}, not data.{name}")
    value = given[name]
    if name == "videos":
        return [({"video": path}, None) for path in find_videos(value)]
    rows = list[Row]()
    for number, item in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(item, str) and (name == "pairs" or os.path.exists(item) or Path(item).suffix.lower() in READERS):
            rows += read_list(item, f"data.{name}")
        else:
            rows.append(make_row(f"data.{name}[{number}]", {"prompt": item} if name == "prompts" else item))
    if not rows:
        raise DataError(f"data.{name}={value!r}: expected at least one")
    if name == "pairs":
        return [pair for row in rows for pair in _pairs_of(row, "question" if task == "qa" else "prompt")]
    return [({"prompt": text}, error) for text, error in (text_of(row, "prompt") for row in rows)]


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
            # Existing folders that a pattern begins with, such as "raw [1080p]", mean themselves.
            folder = next(parent for parent in path.parents if parent.is_dir())
            names = glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True)
            # Links to folders above them give the same files many times; the shortest name is the last.
            files = {os.path.realpath(folder / name): folder / name for name in reversed(sorted(names, key=len))}
            found = sorted(str(file) for file in files.values() if file.is_file())
            if not found:
                raise DataError(f"data.videos={item!r}: no such file or folder, and nothing matches it as a pattern")
        paths.update(dict.fromkeys(found))
    return list(paths)


def read_list(path: str, name: str) -> list[Row]:
    """Rows of a file that an option names; one that cannot be read or holds none is a DataError about the option."""
    try:
        rows = list(read_rows(path))
    except DataError as error:
        raise DataError(f"{name}={path!r}: {str(error).removeprefix(f'{path}: ')}") from error
    if not rows:
        raise DataError(f"{name}={path!r}: holds no row")
    return rows


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


def _pairs_of(row: Row, field: str) -> list[Input]:
    """The pairs of one row, one for each video that it names."""
    name, options = ("source", ["replace", "strength"]) if field == "prompt" else ("video", [])
    video, error = text_of(row, "video")
    text: str | None = None
    if row.fields.get(field) is not None or row.fields.get("replace") is None:  # else the prompt is the model's
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
        most = MAX_QUESTIONS
        self.groups = [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> tuple[list[int], list[str | None], torch.Tensor | None]:
        indices, errors, frames = self.groups[number], list[str | None](), None
        for row, error in (self.inputs[index] for index in indices):
            text = row.get("question", row.get("prompt"))
            try:
                if error is None and text is not None:
                    tokenize(self.tokenizer, [text], self.prompt_length)
            except TextTooLongError as failure:
                error = str(failure)
            errors.append(error)
        video = self.videos[indices[0]]
        if video is not None and None in errors:
            try:
                frames = read_video(video, self.size.num_frames, self.size.height, self.size.width)
            except VideoError as failure:
                errors = [error or str(failure) for error in errors]
        return indices, errors, frames

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
