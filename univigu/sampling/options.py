"""How samples are drawn: one dataclass, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Solver = Literal["scheduler", "euler", "heun", "unipc", "dpm"]

TEXT_FLOW_OPTIONS: dict[str, dict[str, str]] = {
    "embedding": {},
    "uniform": {"temperature": "temperature", "top_p": "top_p"},
    "mask": {
        "temperature": "temperature", "top_p": "top_p",
        "text_order": "order", "confidence_threshold": "threshold",
    },
}  # fmt: skip
"""Which options a text flow knows, and how it calls them (see ``make_text_flow``)."""
_VIDEO = ("num_inference_steps", "guidance_scale", "guidance_interval", "solver")
_CLEAN_VIDEO = ("caption_refresh", "caption_guidance_scale", "caption_guidance")
TASK_OPTIONS: dict[str, tuple[str, ...]] = {
    "caption": ("caption_steps", *_CLEAN_VIDEO),
    "joint": (*_VIDEO, "joint_lag", *_CLEAN_VIDEO),
    "edit": (*_VIDEO, "batch_guidance"),
}
"""Which options mean something to a task, beside those of its text flow if it makes text."""
_INSTEAD = {
    ("caption", "num_inference_steps"): "caption_steps",
    ("caption", "guidance_scale"): "caption_guidance_scale",
    ("joint", "caption_steps"): "num_inference_steps (and joint_lag)",
    ("edit", "caption_steps"): "num_inference_steps",
    ("edit", "caption_guidance_scale"): "guidance_scale",
}
"""What is probably meant, by task and keyword."""


@dataclass
class SamplingOptions:
    """How samples are drawn."""

    num_inference_steps: int = 20
    """Denoising steps of the video (and of both modalities in ``joint``)."""
    joint_lag: int = 0
    """Steps by which the text of ``joint`` ends after the video: its last ones are taken beside the finished video, as
    a caption's are.  0 ends both together; with the surest words first, the least sure are left for then."""
    guidance_scale: float = 3.0
    """Classifier-free guidance on the video; 1 or less switches it off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Flow times (0 noise, 1 data) between which guidance is on (Kynkaanniemi et al., 2024, arXiv:2404.07724)."""
    batch_guidance: bool = False
    """Compute the conditional and the unconditional prediction of ``generate`` and ``edit`` in one batch: faster on an
    idle accelerator, twice the activations.  Tasks with text take them in turn, because the second has no text."""
    solver: Solver = "scheduler"
    """"scheduler": the one of the foundation's folder; "euler", "heun", and diffusers' "unipc" and "dpm" (DPM++ 2M):
    with that one's shift."""
    caption_steps: int = 50
    """Denoising steps of the text when the video is clean."""
    caption_refresh: int = 1
    """Every how many text steps a video that reads text is computed anew: 1 is exact, more is an approximation and as
    many times faster.  Clean video of weights trained with ``clean_video_reads_text: false`` reads none and is computed
    once, exactly, whatever stands here; the noise of ``caption_guidance`` "video" always reads it."""
    caption_guidance_scale: float = 1.0
    """Guidance on a caption's posterior (or velocity); 1 switches it off.  It takes a second pass a step: see
    ``caption_guidance`` for its cost."""
    caption_guidance: Literal["video", "prompt"] = "video"
    """What the guided caption is contrasted with.  "video": pure noise in the video's place; noise reads text in every
    model, so that its pass is one of all tokens every ``caption_refresh`` steps, with 1 every step, and then costs what
    a caption without any cache does.  "prompt": the null condition in the prompt's (for a question, say), beside the
    same clean video; that doubles the cost."""
    temperature: float = 0.0
    """Temperature of a discrete text flow's posterior; 0 takes its mode."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability (nucleus); 1 draws from all."""
    text_order: Literal["random", "confidence"] = "random"
    """In which order the ``mask`` flow reveals tokens: as the path does, or the surest first."""
    confidence_threshold: float = 1.0
    """With ``text_order`` "confidence": tokens at least this sure need not wait for their turn; 1 makes all wait."""

    def __post_init__(self) -> None:
        for name, least in (("num_inference_steps", 1), ("joint_lag", 0), ("caption_steps", 1), ("caption_refresh", 1)):
            if getattr(self, name) < least:
                self._refuse(name, f"at least {least}")
        for name, allowed in (
            ("solver", get_args(Solver)),
            ("caption_guidance", ("video", "prompt")),
            ("text_order", ("random", "confidence")),
        ):
            if getattr(self, name) not in allowed:
                self._refuse(name, f"one of {list(allowed)}")
        if self.temperature < 0:
            self._refuse("temperature", "at least 0")
        for name in ("top_p", "confidence_threshold"):
            if not 0 < getattr(self, name) <= 1:
                self._refuse(name, "over 0, at most 1")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            self._refuse("guidance_interval", "0 <= low <= high <= 1")

    def _refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"sampling.{name}={getattr(self, name)!r}: expected {expected}")

    def text_flow_options(self, text_flow: str) -> dict[str, Any]:
        """Those of these options that belong to a text flow of that name (see ``make_text_flow``)."""
        return {theirs: getattr(self, ours) for ours, theirs in TEXT_FLOW_OPTIONS.get(text_flow, {}).items()}

    def check_keywords(self, keywords: Mapping[str, Any], task: str, text_flow: str) -> None:
        """See that each option that a call names means something to its task; an object of options names none.

        Args:
            keywords: the options named, which these options have taken over.
            task: one of :data:`TASK_OPTIONS`.
            text_flow: the model's.

        Raises:
            ValueError: one of them would be ignored; it says what to use instead.
        """
        of_text = () if task == "edit" else tuple(TEXT_FLOW_OPTIONS.get(text_flow, {}))
        used = TASK_OPTIONS[task] + of_text
        for name, value in keywords.items():
            if name not in used:
                of_flow = any(name in known for known in TEXT_FLOW_OPTIONS.values()) and task != "edit"
                where = f"{task} with the {text_flow!r} text flow" if of_flow else task
                use = _INSTEAD.get((task, name), f"one of {', '.join(used)}")
                raise ValueError(f"{name}={value!r}: {where} does not use it; use {use}")
            if task == "joint" and name in _CLEAN_VIDEO and not self.joint_lag:
                raise ValueError(f"{name}={value!r}: joint uses it after the video's end; use it with joint_lag over 0")
