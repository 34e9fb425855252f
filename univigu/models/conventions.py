"""Conventions of a model's inputs, which are recorded in its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
from diffusers import AutoencoderKLWan

from univigu.models.encode import encode_clips
from univigu.models.foundation import decode_latents, denormalize_latents, normalize_latents

NullCondition = Literal["encoded", "zeros"]
PromptPadding = Literal["zeros", "encoded"]


@dataclass(frozen=True)
class Conventions:
    """The defaults are WanPipeline's; models made elsewhere may have been trained with others."""

    latents_normalized: bool = True
    """Whether latents have zero mean and unit deviation a channel; False takes the VAE's own."""
    null_condition: NullCondition = "encoded"
    """The null condition: the encoded empty prompt, or zeros."""
    prompt_padding: PromptPadding = "zeros"
    """Prompt embeddings past the prompt's end: zeros, or what the text encoder gives for padding."""

    def __post_init__(self) -> None:
        for name in ("null_condition", "prompt_padding"):
            if getattr(self, name) not in ("encoded", "zeros"):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected 'encoded' or 'zeros'")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Those of a model's configuration; missing entries are the defaults."""
        return cls(**{name: config[name] for name in CONVENTIONS if name in config})

    def null(self, embeds: torch.Tensor) -> torch.Tensor:
        """The null condition, given the encoded empty prompt [..., S, text_dim]."""
        return torch.zeros_like(embeds) if self.null_condition == "zeros" else embeds

    def encode(self, vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
        """Video [B, C, F, H, W] in [-1, 1] -> float32 latents [B, C, T, H, W] for the transformer."""
        return self.from_normalized(encode_clips(vae, video), vae)

    def from_normalized(self, latents: torch.Tensor, vae: AutoencoderKLWan) -> torch.Tensor:
        """Normalised latents, as in shards, for the transformer."""
        return latents if self.latents_normalized else denormalize_latents(latents, vae)

    def decode(self, vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
        """The transformer's latents [B, C, T, H, W] -> video [B, C, F, H, W], roughly in [-1, 1]."""
        latents = latents if self.latents_normalized else normalize_latents(latents, vae)
        return decode_latents(vae, latents)


CONVENTIONS = tuple(field.name for field in fields(Conventions))
"""Names of the entries in a model's configuration."""
OFFICIAL = Conventions(latents_normalized=False, null_condition="zeros", prompt_padding="encoded")
"""The official preview's, as far as is known."""
