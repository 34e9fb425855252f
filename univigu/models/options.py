"""Options of the unified transformer, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from univigu.flow.time import NUM_TRAIN_TIMESTEPS

TextFlowName = Literal["embedding", "uniform", "mask"]
TextAttention = Literal["shared", "own"]

REPLACED = {
    "text_rotary": "text_positions: 0 gives rotary positions, n > 0 gives n learned positions and no rotary ones",
    "separate_text_attention": "text_attention: 'own' gives text its own projections, 'shared' the video's",
    "text_projects_video": "text_attention: with 'own', text also reads the video through its own projections",
}
"""Former keys of the transformer's configuration and what to use instead."""


@dataclass
class ArchitectureOptions:
    """What a text stream adds to a Wan transformer. The defaults are the paper's architecture."""

    text_flow: TextFlowName = "uniform"
    """Process of the text: "embedding" (continuous, on token embeddings), "uniform" or "mask" (discrete)."""
    text_positions: int = 0
    """0: rotary positions, as in the paper. n > 0: n learned absolute positions instead, n being the longest text."""
    text_attention: TextAttention = "shared"
    """Projections of the text. "shared": the video's, as in the paper. "own": its own for queries, keys, values and
    output in both attentions, and its own keys and values of the video, which is what a frozen generator needs."""
    separate_text_ffn: bool = True
    """Whether text has its own FFNs, as in the paper; False shares the video's."""
    clean_video_reads_text: bool = True
    """Whether clean video (timestep 0) attends to text. False makes its keys and values independent of the text, so
    that captioning computes them once."""
    clean_video_reads_prompt: bool = True
    """Whether clean video beside text attends to the prompt (or question). False shows it the null condition, so that
    one pass of it serves any number of questions; it needs ``clean_video_reads_text: false``."""
    clean_video_timestep: float = 0.0
    """Conditioning timestep for clean video beside text, in [0, 1000)."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Those of a transformer's configuration."""
        return cls(**{field.name: config[field.name] for field in fields(cls)})

    def __post_init__(self) -> None:
        for name, choices in (("text_flow", get_args(TextFlowName)), ("text_attention", get_args(TextAttention))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {choices}")
        if self.text_positions < 0:
            raise ValueError(f"text_positions={self.text_positions!r}: expected at least 0")
        if self.clean_video_reads_text and not self.clean_video_reads_prompt:
            raise ValueError("clean_video_reads_prompt=False: expected with clean_video_reads_text=False only")
        timestep = self.clean_video_timestep
        if not 0 <= timestep < NUM_TRAIN_TIMESTEPS:
            raise ValueError(f"clean_video_timestep={timestep!r}: expected a number in [0, {NUM_TRAIN_TIMESTEPS})")


def check_replaced(config: Mapping[str, Any], source: Any) -> None:
    """Raise a ValueError if a saved configuration has a former key; names the key and its successor."""
    for name, successor in REPLACED.items():
        if name in config:
            raise ValueError(f"{source}: {name} is no longer an option of the transformer; use {successor}")
