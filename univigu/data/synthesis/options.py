"""Options of the synthesis, and what sources and captioners have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

INSTRUCTION = (
    "These are {num_frames} frames of one video, in order. It was made from this prompt: {prompt}\n"
    "Describe the video in one detailed paragraph of about {words} words: its subjects and their looks, how they move "
    "from the first frame to the last, the background, the light, the camera. Do not contradict the prompt, add what "
    "only the frames show, and write nothing but the description."
)
TEMPLATE = (
    "the video shows {prompt}. the clip is {num_frames} frames long, {width} pixels wide and {height} pixels high, and "
    "is played at {fps} frames a second. from the first frame to the last it shows the same scene: {prompt}. the "
    "picture is one continuous shot without cuts, the camera does not move, and there is no text in the picture. "
    "nothing else enters or leaves the frame, the light is even, and the background stays as it is while the clip "
    "lasts."
)


def _check_least(options: Any, least: Mapping[str, float], name: str) -> None:
    for field, bound in least.items():
        value = getattr(options, field)
        if value is not None and value < bound:
            raise ValueError(f"{name}.{field}={value}: expected at least {bound}")


@dataclass(frozen=True)
class VideoOptions:
    """How clips are made of prompts."""

    height: int = 64
    """Of the clips in pixels; H.264 wants it even."""
    width: int = 64
    """Likewise."""
    num_frames: int = 9
    """Frames a clip; 4k+1 for Wan."""
    fps: int = 8
    """Frames a second that are written into the file; Wan2.1's clips are meant for 16."""
    steps: int = 20
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance; None leaves it to the pipeline."""
    negative_prompt: str | None = None
    """None leaves it to the pipeline."""
    batch_size: int = 4
    """Clips generated at once.  They are part of what a run is made of: other batches round differently."""
    videos_per_prompt: int = 1
    """Clips of each prompt, each from its own seed."""
    seed: int = 0
    """Seed of the first clip; the others count up from it."""
    dtype: str = "float32"
    """Of the generator: float32, bfloat16 or float16."""
    crf: int = 12
    """x264's constant rate factor: 0 is lossless, 23 its usual default."""

    def __post_init__(self) -> None:
        least = {"height": 2, "width": 2, "num_frames": 1, "fps": 1, "steps": 1, "guidance_scale": 0, "seed": 0}
        _check_least(self, least | {"batch_size": 1, "videos_per_prompt": 1, "crf": 0}, "video")
        for name in ("height", "width"):
            if getattr(self, name) % 2:
                raise ValueError(f"video.{name}={getattr(self, name)}: expected an even number")
        check_dtype(self.dtype, "video.dtype")


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are written."""

    frames: int = 8
    """Frames of the clip, spread evenly, that a language model is shown."""
    tries: int = 4
    """How often a caption is written, each time with another seed, until its length is in the window."""
    batch_size: int = 1
    """Clips captioned at once, which share the random numbers."""
    max_new_tokens: int = 400
    """Most tokens (the language model's own) of a caption."""
    temperature: float = 0.7
    """Of the draws; 0 takes the likeliest token, and another try is then the same."""
    top_p: float = 0.9
    """Share of the probability that is drawn from."""
    instruction: str = INSTRUCTION
    """What the language model is asked; {prompt}, {num_frames} and {words} are filled in."""
    template: str = TEMPLATE
    """What the captioner "template" writes; {prompt}, {num_frames}, {height}, {width} and {fps} are filled in."""
    dtype: str = "float32"
    """Of the language model: float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        least = {"frames": 1, "tries": 1, "batch_size": 1, "max_new_tokens": 1, "temperature": 0}
        _check_least(self, least, "caption")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"caption.top_p={self.top_p}: expected a number in (0, 1]")
        known = {"instruction": {"prompt", "num_frames", "words"}}
        known["template"] = {"prompt", "num_frames", "height", "width", "fps"}
        for name, names in known.items():
            try:
                getattr(self, name).format(**dict.fromkeys(names, ""))
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(f"caption.{name}: expected only the fields {sorted(names)} ({error!r})") from error
        check_dtype(self.dtype, "caption.dtype")


def check_dtype(name: str, option: str) -> torch.dtype:
    """The torch dtype of that name; raises ValueError for one that models are not run in."""
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{option}={name!r}: expected 'float32', 'bfloat16' or 'float16'")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def derived_seed(*parts: int) -> int:
    """A seed that is a hash of numbers, so that neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "little")


class Rejection(Exception):
    """A sample that is left out, and why; it becomes a row of the manifest's ``skipped``."""

    def __init__(self, reason: str, key: str, field: str, value: str) -> None:
        super().__init__(f"{key}: {reason} in {field}: {value}")
        self.row = {"reason": reason, "key": key, "field": field, "value": value[:200]}


@dataclass
class Clip:
    """A clip on its way into a shard."""

    key: str
    """Its name in the shard: the number among all that were asked for."""
    prompt: str
    seed: int
    """What the clip was made with."""
    frames: torch.Tensor | None = None
    """uint8 [F, C, H, W]; None until they are made, and where the generator made something that is no number."""
    scene: dict[str, Any] | None = None
    """The embedded world's description, where there is one."""
    caption: str = ""
    caption_seed: int | None = None
    """What the caption was drawn with; None where nothing was drawn."""


class Source(Protocol):
    """Where clips come from."""

    def __len__(self) -> int:
        """How many there are."""

    def parameters(self) -> dict[str, Any]:
        """What the clips depend on, for the manifest."""

    def clip(self, number: int) -> Clip:
        """The clip of a number, without its frames; raises Rejection if there cannot be one."""

    def render(self, clips: list[Clip]) -> None:
        """Make the frames."""


class Captioner(Protocol):
    """Who describes them."""

    tries: int
    """How often it is worth asking."""
    filtered: bool
    """Whether the captions are meant to fit the window of lengths."""

    def parameters(self) -> dict[str, Any]:
        """What the captions depend on, for the manifest."""

    def describe(self, clips: list[Clip], attempt: int) -> None:
        """Write the captions (and their seeds); another attempt gives other ones."""
