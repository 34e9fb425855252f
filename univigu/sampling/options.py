"""How samples are drawn: one dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Solver = Literal["scheduler", "euler", "heun", "unipc", "dpm"]


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
    """Every how many text steps the clean video is computed anew.  It matters to weights whose clean video reads text:
    1 is exact, more is an approximation and as many times faster.  Others' video is computed once, exactly."""
    caption_guidance_scale: float = 1.0
    """Guidance on a caption's posterior (or velocity); 1 switches it off, at half the cost."""
    caption_guidance: Literal["video", "prompt"] = "video"
    """What the guided caption is contrasted with: pure noise in the video's place, or the null condition in the
    prompt's (for a question, say)."""
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
        options: dict[str, Any] = {}
        if text_flow != "embedding":
            options = {"temperature": self.temperature, "top_p": self.top_p}
        if text_flow == "mask":
            options |= {"order": self.text_order, "threshold": self.confidence_threshold}
        return options
