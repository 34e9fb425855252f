"""What ``lightning predict`` hands to whoever writes it down."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Prediction:
    """One predicted item: what it was made of, and the text, the video, or the error."""

    index: int
    """Position in the list of inputs."""
    source: str
    """Path of the video, or the prompt."""
    text: str | None = None
    video: torch.Tensor | None = None
    """uint8 [F, C, H, W]."""
    error: str | None = None
    seconds: float = 0.0
    seed: int = field(default=0)
