"""One training sample as it is stored in a shard, and the checks made when it is read.

A sample is a group of consecutive tar members that share a key (the name up to its first dot)::

    00000012.mp4                    the video, or
    00000012.latents.safetensors    its normalised latents (precomputed shards)
    00000012.prompt.safetensors     its prompt's embeddings (likewise)
    00000012.json                   {"prompt": str, "caption": str, "scene": ...?, "qa": [{"question", "answer"}]?}

The ``webdataset`` library groups these as ``mp4``, ``latents.safetensors`` and ``json`` of one ``__key__``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi", "m4v")
LATENTS_SUFFIX = "latents.safetensors"
PROMPT_SUFFIX = "prompt.safetensors"
TEXT_SUFFIX = "json"

SampleReason = Literal[
    "missing_field",  # a required member or json field is missing
    "wrong_type",  # a json field has another type than the format says
    "corrupt_json",  # the json member is not UTF-8 JSON
    "unreadable_video",  # the video member does not decode to at least one frame
    "corrupt_latents",  # the latents member is not a safetensors file with a finite "latents" tensor
    "corrupt_embeds",  # the prompt member is not a safetensors file with finite "prompt" and "null" tensors
    "wrong_shape",  # the latents or embeddings have another size than configured
    "duplicate_member",  # two members of a shard have the same name, or a key comes back after another
    "damaged_shard",  # the tar file is empty, truncated, or not a tar file
    "text_over_slot",  # a text has more tokens than its slot
]
SAMPLE_REASONS: tuple[str, ...] = get_args(SampleReason)


class DataError(ValueError):
    """Data that cannot be used as configured; the message is one line that names the file, field or value."""


class SampleError(DataError):
    """A sample that cannot be used.

    Args:
        reason: one of :data:`SAMPLE_REASONS`.
        shard: path of the shard.
        key: the sample's key; None for a whole shard.
        field: the member or json field at fault; None for the whole sample.
        value: what was found there, or the decoder's message.
    """

    def __init__(self, reason: SampleReason, shard: str, key: str | None, field: str | None, value: object) -> None:
        if reason not in SAMPLE_REASONS:
            raise ValueError(f"reason={reason!r}: expected one of {SAMPLE_REASONS}")
        self.reason, self.shard, self.key, self.field = reason, shard, key, field
        self.value = value if isinstance(value, str) else repr(value)
        if len(self.value) > 200:
            self.value = self.value[:200] + "..."
        where = f"{shard}: " + (f"sample {key!r}: " if key is not None else "")
        super().__init__(f"{where}{reason}" + (f" in {field!r}" if field else "") + f": {self.value}")

    def __reduce__(self) -> tuple[Any, ...]:  # workers send these to the training process
        return SampleError, (self.reason, self.shard, self.key, self.field, self.value)


def without_traceback(error: SampleError) -> SampleError:
    """The error without its traceback, which would keep decoded frames in memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def is_unicode(text: str) -> bool:
    """Whether a string is valid Unicode: JSON may hold half of a surrogate pair, which no tokenizer accepts."""
    return not any("\ud800" <= mark <= "\udfff" for mark in text)


def is_video(path: Path) -> bool:
    """Whether the suffix, in upper or lower case, is a video's."""
    return path.suffix[1:].lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Texts:
    """The json member of a sample."""

    prompt: str
    caption: str
    scene: dict[str, Any] | None = None
    """The embedded world's description of the clip; None if the field holds anything else."""
    qa: list[dict[str, str]] | None = None
    """Pairs {"question", "answer"} about the clip."""

    def question(self, number: int | None) -> Texts:
        """Texts with that question as the prompt and its answer as the caption; None returns the texts unchanged."""
        if number is None or self.qa is None:
            return self
        pair = self.qa[number]
        return Texts(pair["question"], pair["answer"], self.scene, self.qa)


def questions_of(batch: Mapping[str, Any]) -> list[str] | None:
    """A batch's questions if its captions are their answers, else None."""
    questions: list[str | None] = batch.get("question") or []
    asked = [question for question in questions if question is not None]
    return asked if asked and len(asked) == len(questions) else None


@dataclass(frozen=True)
class Sample:
    """One sample; exactly one of ``video`` and ``latents`` is set."""

    key: str
    shard: str
    texts: Texts
    video: bytes | None = None
    """The encoded video file."""
    latents: torch.Tensor | None = None
    """Normalised latents float32 [C, T, H, W]."""
    prompt_embeds: torch.Tensor | None = None
    """The encoded prompt float32 [S, text_dim], S its tokens; optional, only with latents."""
    null_embeds: torch.Tensor | None = None
    """The encoded empty prompt; set if and only if ``prompt_embeds`` is."""


def parse_texts(raw: bytes | None, shard: str, key: str) -> Texts:
    """Check and parse a json member; None means that the sample has none.

    Raises:
        SampleError: missing_field, corrupt_json or wrong_type, naming the field.
    """
    if raw is None:
        raise SampleError("missing_field", shard, key, TEXT_SUFFIX, "the sample has no such member")
    try:
        data = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SampleError("corrupt_json", shard, key, TEXT_SUFFIX, str(error)) from error
    if not isinstance(data, dict):
        raise SampleError("wrong_type", shard, key, TEXT_SUFFIX, f"expected an object, got {type(data).__name__}")
    for name in ("prompt", "caption"):
        if name not in data:
            raise SampleError("missing_field", shard, key, name, f"the json holds {sorted(data)}")
        if not isinstance(data[name], str):
            raise SampleError("wrong_type", shard, key, name, f"expected a string, got {data[name]!r}")
        if not is_unicode(data[name]):
            raise SampleError("corrupt_json", shard, key, name, f"no valid Unicode: {data[name]!r}")
    qa, scene = data.get("qa"), data.get("scene")
    if qa is not None and not _is_qa(qa):
        raise SampleError("wrong_type", shard, key, "qa", f"expected a list of question/answer strings, got {qa!r}")
    if scene is not None:
        from univigu.shapes.scenes import is_scene

        scene = scene if is_scene(scene) else None  # other data sets may use the name freely
    return Texts(data["prompt"], data["caption"], scene, qa)


def _is_qa(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(pair, dict) for pair in value):
        return False
    texts = [pair.get(name) for pair in value for name in ("question", "answer")]
    return all(isinstance(text, str) and is_unicode(text) for text in texts)


def media_suffix(members: Mapping[str, object], shard: str, key: str) -> str:
    """The member that holds a sample's latents or, without them, its video.

    Raises:
        SampleError: missing_field, if it has neither.
    """
    for suffix in (LATENTS_SUFFIX, *VIDEO_SUFFIXES):
        if suffix in members:
            return suffix
    found = f"expected {LATENTS_SUFFIX} or one of {', '.join(VIDEO_SUFFIXES)}; the sample holds {sorted(members)}"
    raise SampleError("missing_field", shard, key, "video", found)


def parse_sample(members: Mapping[str, bytes], shard: str, key: str) -> Sample:
    """Build a sample from its members' bytes by suffix.

    Raises:
        SampleError: naming shard, key and the member or field at fault.
    """
    texts = parse_texts(members.get(TEXT_SUFFIX), shard, key)
    suffix = media_suffix(members, shard, key)
    if suffix != LATENTS_SUFFIX:
        return Sample(key, shard, texts, video=members[suffix])

    def tensors(suffix: str, names: tuple[str, ...], ndim: int, reason: SampleReason) -> list[torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            found = load(members[suffix])
        except (SafetensorError, ValueError, KeyError) as error:
            raise SampleError(reason, shard, key, names[0], str(error)) from error
        for name in names:
            if name not in found:
                raise SampleError(reason, shard, key, name, f"the file holds {sorted(found)}")
            if found[name].ndim != ndim:
                shape = list(found[name].shape)
                raise SampleError("wrong_shape", shard, key, name, f"expected {ndim} dimensions, got {shape}")
            # a sum is ten times faster than isfinite of each number, and finite only if they all are
            if not found[name].float().sum().isfinite() and not found[name].isfinite().all():
                raise SampleError(reason, shard, key, name, "not all values are finite")
        return [found[name].float() for name in names]

    (latents,) = tensors(LATENTS_SUFFIX, ("latents",), 4, "corrupt_latents")
    prompt, null = None, None
    if PROMPT_SUFFIX in members:
        prompt, null = tensors(PROMPT_SUFFIX, ("prompt", "null"), 2, "corrupt_embeds")
    return Sample(key, shard, texts, None, latents, prompt, null)
