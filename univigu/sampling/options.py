"""Options of sampling, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from univigu.flow.text import Order

Solver = Literal["scheduler", "euler", "unipc", "dpm"]

_TEXT = ("temperature", "top_p", "text_order")
_VIDEO = ("num_inference_steps", "guidance_scale", "guidance_interval", "solver")
_CLEAN_VIDEO = ("caption_refresh", "caption_guidance_scale")
TASK_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("caption", "answer"), ("caption_steps", *_CLEAN_VIDEO, *_TEXT)),
    "joint": (*_VIDEO, "joint_lag", *_CLEAN_VIDEO, *_TEXT),
    "edit": _VIDEO,
}
"""Options that a task uses; ``text_order`` with the mask flow only."""


@dataclass
class SamplingOptions:
    """How samples are drawn."""

    num_inference_steps: int = 20
    """Denoising steps of the video (and of both modalities in ``joint``)."""
    joint_lag: int = 10
    """Steps by which the text of ``joint`` ends after the video; these last ones see the finished video, as a caption's
    do. With ``text_order`` "confidence" they reveal the least certain words. 0 ends both together."""
    guidance_scale: float = 2.0
    """Classifier-free guidance on the video; 1 or less switches it off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Flow times (0 noise, 1 data) between which guidance is on (Kynkaanniemi et al., 2024, arXiv:2404.07724)."""
    solver: Solver = "scheduler"
    """"scheduler": the one of the foundation's folder. Others are diffusers' flow-matching "euler", "unipc" and
    "dpm" (DPM++ 2M), with that one's shift."""
    caption_steps: int = 50
    """Denoising steps of the text when the video is clean."""
    caption_refresh: int = 1
    """Recompute a video that reads text every so many text steps: 1 is exact, more is an approximation and as many
    times faster. It changes nothing with ``clean_video_reads_text: false``: the video is computed once, exactly."""
    caption_guidance_scale: float = 1.0
    """Classifier-free guidance on the logits of a text that has a prompt or question; 1 switches it off. A second pass
    a step sees the same clean video with the null condition."""
    temperature: float = 0.0
    """Temperature of the text's posterior; 0 takes the likeliest token (in the embedding flow: leaves it as it is)."""
    top_p: float = 1.0
    """Probability of the likeliest tokens to draw from (nucleus); 1 draws from all."""
    text_order: Order = "confidence"
    """Order in which the ``mask`` flow reveals tokens: as the path does, or the most certain first ("confidence")."""

    def __post_init__(self) -> None:
        def check(name: str, valid: bool, expected: str) -> None:
            if not valid:
                raise ValueError(f"sampling.{name}={getattr(self, name)!r}: expected {expected}")

        for name, least in (("num_inference_steps", 1), ("joint_lag", 0), ("caption_steps", 1), ("caption_refresh", 1)):
            check(name, getattr(self, name) >= least, f"at least {least}")
        for name, choices in (("solver", Solver), ("text_order", Order)):
            check(name, getattr(self, name) in get_args(choices), f"one of {list(get_args(choices))}")
        check("temperature", self.temperature >= 0, "at least 0")
        check("top_p", 0 < self.top_p <= 1, "over 0, at most 1")
        low, high = self.guidance_interval
        check("guidance_interval", 0 <= low <= high <= 1, "0 <= low <= high <= 1")

    def check_keywords(self, keywords: Mapping[str, Any], task: str, text_flow: str) -> None:
        """Raise a ValueError for an option, given by keyword beside these options, that the task does not use."""
        for name, value in keywords.items():
            if name not in TASK_OPTIONS[task]:
                used = ", ".join(TASK_OPTIONS[task])
                raise ValueError(f"{name}={value!r}: {task} does not use it; it uses {used}")
            if name == "text_order" and text_flow != "mask":
                raise ValueError(f"{name}={value!r}: {task} with the {text_flow!r} text flow does not use it")
            if task == "joint" and name in _CLEAN_VIDEO and not keywords.get("joint_lag", self.joint_lag):
                raise ValueError(f"{name}={value!r}: joint uses it after the video's end; use it with joint_lag over 0")
