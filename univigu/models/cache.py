"""Keys and values that denoising steps share: those of the prompt, and of clean video."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [B, S, heads, head_dim], normalised and rotated: ready for attention."""


@dataclass
class LayerCache:
    """One block's share of an ``AttentionCache``."""

    keep_video: bool = False
    """Whether to keep ``joint``."""
    prompt: KeyValue | None = None
    """Of the cross-attention onto the encoded prompt, [B, S, ...]."""
    joint: KeyValue | None = None
    """Of the self-attention over [video ; text], [B, N + L, ...]; each text step overwrites the last L."""


@dataclass
class AttentionCache:
    """Keys and values of one batch under one prompt; a forward pass fills it, later ones read it.

    ``model(latents, timestep, prompt_embeds, text, cache=cache)`` computes everything and keeps the video's keys and
    values; ``model(None, None, None, text, cache=cache)`` then computes only the text. That is exact if the video does
    not read text (``clean_video_reads_text: false``, timestep 0), else an approximation. The prompt's are always exact.
    """

    keep_video: bool = True
    """False keeps only the prompt's keys and values, as while the video itself is denoised."""
    prompt_embeds: torch.Tensor | None = None
    """The embeddings the prompt's keys and values were computed from."""
    layers: list[LayerCache] = field(default_factory=list)
    video_tokens: int = 0
    """N, how many of the joint keys are the video's; 0 until a pass with text has filled the cache."""
    text_tokens: int = 0
    """L, the length of text it was filled with."""

    @property
    def states_dtype(self) -> torch.dtype:
        """The type of the blocks' states in the pass that filled the cache."""
        assert self.layers[0].joint is not None
        return self.layers[0].joint[1].dtype

    def begin(self, prompt_embeds: torch.Tensor, num_layers: int) -> None:
        """Prepare for a pass; a ValueError if the cache holds another prompt's keys."""
        if self.prompt_embeds is None:
            self.prompt_embeds, self.layers = prompt_embeds, [LayerCache(self.keep_video) for _ in range(num_layers)]
        # Hooks that move a model's inputs may hand on a copy.
        if self.prompt_embeds is not prompt_embeds and not torch.equal(self.prompt_embeds, prompt_embeds):
            raise ValueError("cache: filled with another prompt's embeddings; take a new cache for each tensor of them")
