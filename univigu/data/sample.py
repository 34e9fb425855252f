"""One sample: where its members are stored, and the checks made when they are read.  docs/DATA.md has the format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from univigu.data.video import VideoError, read_video
from univigu.shapes.scenes import is_scene

VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi", "m4v")
LATENTS_SUFFIX = "latents.safetensors"
PROMPT_SUFFIX = "prompt.safetensors"
TEXT_SUFFIX = "json"

SampleReason = Literal[
    "missing_field",  # a required member or json field is missing
    "wrong_type",  # a json field has another type than the format says
    "corrupt_json",  # the json member is not UTF-8 JSON
    "corrupt_row",  # the row of a list is no JSON object, or has another number of fields than the header
    "unreadable_video",  # the video member does not decode to at least one frame
    "corrupt_latents",  # the latents member is not a safetensors file with a finite "latents" tensor
    "corrupt_embeds",  # the prompt member is not a safetensors file with finite "prompt" and "null" tensors
    "wrong_shape",  # the latents or embeddings have another size than configured
    "duplicate_member",  # two members of a shard have the same name, or a key comes back after another
    "damaged_shard",  # the tar file is empty, truncated, or not a tar file
    "text_over_slot",  # a text has more tokens than its slot
]


class DataError(ValueError):
    """Data that cannot be used as configured; the message is one line that names the file, field or value."""


class SampleError(DataError):
    """A sample (or, without a key, a shard) that cannot be used; ``value`` is what was found in the ``field``."""

    def __init__(self, reason: SampleReason, shard: str, key: str | None, field: str | None, value: object) -> None:
        value = value if isinstance(value, str) else repr(value)
        self.value = value if len(value) <= 200 else value[:200] + "..."
        self.reason, self.shard, self.key, self.field = reason, shard, key, field
        super().__init__(reason, shard, key, field, self.value)  # what pickle and copy call it with

    def __str__(self) -> str:
        sample = "" if self.key is None else f"sample {self.key!r}: "
        return f"{self.shard}: {sample}{self.reason}{f' in {self.field!r}' if self.field else ''}: {self.value}"


def is_unicode(text: str) -> bool:
    """Whether a string is valid Unicode: JSON may hold half of a surrogate pair, which no tokenizer accepts."""
    return re.search("[\ud800-\udfff]", text) is None


def is_video(path: Path) -> bool:
    """Whether the suffix, in upper or lower case, is a video's."""
    return path.suffix[1:].lower() in VIDEO_SUFFIXES


def questions_of(batch: Mapping[str, Any]) -> list[str] | None:
    """A batch's questions if its captions are their answers, else None."""
    questions: list[Any] = batch.get("question") or [None]
    return None if None in questions else questions


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Location of a sample; its members are read and checked on demand, with a SampleError for what is wrong."""

    shard: str
    key: str
    members: dict[str, tuple[str, int, int] | bytes]
    """By suffix: (file, offset, size), where a size of -1 is the rest of the file; or the content."""
    question: int | None = None
    """Number of the sample's question that is used; None for its prompt and caption."""
    source: int = 0
    """Number of the data source."""
    bucket: int = 0
    """Number of the size that its video is brought to."""

    def error(self, reason: SampleReason, field: str | None, value: object) -> SampleError:
        return SampleError(reason, self.shard, self.key, field, value)

    @property
    def media(self) -> str:
        """Suffix of the member that holds the latents or, without them, the video."""
        for suffix in (LATENTS_SUFFIX, *VIDEO_SUFFIXES):
            if suffix in self.members:
                return suffix
        raise self.error("missing_field", "video", f"the sample holds {sorted(self.members)}")

    def read(self, suffix: str, limit: int | None = None) -> bytes:
        """A member's content, or at most ``limit`` bytes of it."""
        member = self.members.get(suffix)
        if member is None:
            raise self.error("missing_field", suffix, "the sample has no such member")
        if isinstance(member, bytes):
            return member
        path, offset, size = member
        size = size if limit is None else min(limit, size)
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except (OSError, ValueError) as error:
            reason: SampleReason = "missing_field" if suffix == TEXT_SUFFIX else "unreadable_video"
            raise self.error(reason, suffix, f"{path}: {error}") from error
        if len(data) < size:  # truncated after it was indexed
            raise self.error("damaged_shard", suffix, f"{len(data)} of {size} bytes are there")
        return data

    def texts(self) -> dict[str, Any]:
        """The texts of the json member: "prompt" and "caption", the embedded world's "scene" or None, and a list "qa".

        If a question is chosen, it is the prompt and its answer the caption, and "question" and "kind" are not None.
        """
        text = self.read(TEXT_SUFFIX)
        try:
            data = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # no text or JSON, a huge number, or nested too deep
            raise self.error("corrupt_json", TEXT_SUFFIX, str(error)) from error
        if not isinstance(data, dict):
            raise self.error("wrong_type", TEXT_SUFFIX, f"expected an object, got {type(data).__name__}")
        for name in ("prompt", "caption"):
            if name not in data:
                raise self.error("missing_field", name, f"the json holds {sorted(data)}")
            if not isinstance(data[name], str):
                raise self.error("wrong_type", name, f"expected a string, got {data[name]!r}")
            if not is_unicode(data[name]):
                raise self.error("corrupt_json", name, f"no valid Unicode: {data[name]!r}")
        qa, scene = data.get("qa"), data.get("scene")
        if qa is not None and not _is_qa(qa):
            raise self.error("wrong_type", "qa", f"expected a list of question/answer strings, got {qa!r}")
        texts = {"prompt": data["prompt"], "caption": data["caption"], "scene": scene if is_scene(scene) else None}
        texts |= {"qa": qa or [], "question": None, "kind": None}
        if self.question is not None:
            pair = texts["qa"][self.question]
            texts |= {"prompt": pair["question"], "caption": pair["answer"]}
            texts |= {"question": pair["question"], "kind": pair.get("kind")}
        return texts

    def video(self, num_frames: int, height: int, width: int) -> torch.Tensor:
        """The video's frames; see ``univigu.data.video.read_video``."""
        try:
            return read_video(self.read(self.media), num_frames, height, width)
        except VideoError as error:
            raise self.error("unreadable_video", "video", str(error)) from error

    def tensors(self, suffix: str, *names: str) -> list[torch.Tensor]:
        """Float32 tensors: "latents" [C, T, H, W], or "prompt" and "null" [S, text_dim], S their tokens."""
        reason: SampleReason = "corrupt_latents" if suffix == LATENTS_SUFFIX else "corrupt_embeds"
        raw, ndim = self.read(suffix), 4 if suffix == LATENTS_SUFFIX else 2
        try:
            found = load(raw)
        except (SafetensorError, ValueError, KeyError) as error:
            raise self.error(reason, names[0], str(error)) from error
        for name in names:
            if name not in found:
                raise self.error(reason, name, f"the file holds {sorted(found)}")
            if found[name].ndim != ndim:
                raise self.error("wrong_shape", name, f"expected {ndim} dimensions, got {list(found[name].shape)}")
            # a sum is ten times faster than isfinite of each number, and finite only if they all are
            if not found[name].float().sum().isfinite() and not found[name].isfinite().all():
                raise self.error(reason, name, "not all values are finite")
        return [found[name].float() for name in names]


def _is_qa(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(pair, dict) for pair in value):
        return False
    texts = [pair.get(name) for pair in value for name in ("question", "answer")]
    kinds = all(isinstance(pair.get("kind"), str | None) for pair in value)
    return kinds and all(isinstance(text, str) and is_unicode(text) for text in texts)
