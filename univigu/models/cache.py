"""Keys and values that denoising steps share: those of the prompt, and of clean video."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [B, S, heads, head_dim], normalised and rotated: ready for attention."""


@dataclass
class LayerCache:
    """One block's share of an ``AttentionCache``."""

    keep_video: bool = False
    """Whether to keep ``joint``."""
    text_tokens: int = 0
    """Room in ``joint`` for a video without text beside it."""
    prompt: KeyValue | None = None
    """Of the cross-attention onto the encoded prompt, [B, S, ...]."""
    joint: KeyValue | None = None
    """Of the self-attention over [video ; text], [B, N + L, ...]; each text step overwrites the last L."""

    def keep(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the video's keys and values in buffers with room for those of texts."""
        self.joint = pad(key, (0, 0, 0, 0, 0, self.text_tokens)), pad(value, (0, 0, 0, 0, 0, self.text_tokens))


@dataclass
class AttentionCache:
    """Keys and values of one batch; a forward pass fills it, later ones read it.

    ``model(latents, timestep, prompt_embeds, text, cache=cache)`` computes everything and keeps the video's keys and
    values; ``model(None, None, None, text, cache=cache)`` then computes only the text. That is exact if the video does
    not read text (``clean_video_reads_text: false``, timestep 0), else an approximation. The prompt's are always exact.

    Such a video needs no text beside it: ``model(latents, timestep, prompt_embeds, cache=cache, predict_video=False)``
    fills an ``AttentionCache(text_tokens=L)``, which then serves any number of texts of L tokens about each video.
    """

    keep_video: bool = True
    """False keeps only the prompt's keys and values, as while the video itself is denoised."""
    prompt_embeds: torch.Tensor | None = None
    """The embeddings the prompt's keys and values were computed from."""
    layers: list[LayerCache] = field(default_factory=list)
    video_tokens: int = 0
    """N, how many of the joint keys are the video's; 0 until a pass with text has filled the cache."""
    text_tokens: int = 0
    """L, how many of them are of texts."""

    @property
    def videos(self) -> int:
        """B, the number of videos."""
        assert self.layers[0].joint is not None
        return len(self.layers[0].joint[0])

    @property
    def states_dtype(self) -> torch.dtype:
        """The type of the blocks' states in the pass that filled the cache."""
        assert self.layers[0].joint is not None
        return self.layers[0].joint[1].dtype

    def begin(self, prompt_embeds: torch.Tensor, num_layers: int) -> None:
        """Prepare for a pass with video; a ValueError if the cache holds another prompt's keys."""
        if self.prompt_embeds is None:
            self.prompt_embeds = prompt_embeds
            self.layers = [LayerCache(self.keep_video, self.text_tokens) for _ in range(num_layers)]
        if not self._holds(prompt_embeds):
            raise ValueError("cache: filled with another prompt's embeddings; take a new cache for each tensor of them")

    def take_prompt(self, prompt_embeds: torch.Tensor) -> bool:
        """Replace the video's prompt by the text's; returns whether its keys are yet to be computed."""
        if self.layers[0].prompt is not None and self._holds(prompt_embeds):
            return False
        self.prompt_embeds = prompt_embeds
        for layer in self.layers:
            layer.prompt = None
        return True

    def _holds(self, prompt_embeds: torch.Tensor) -> bool:
        assert self.prompt_embeds is not None
        # Hooks that move a model's inputs may hand on a copy.
        return self.prompt_embeds is prompt_embeds or torch.equal(self.prompt_embeds, prompt_embeds)

    def check_room(self, rows: int, length: int) -> None:
        """Raise a ValueError if texts of that number and length do not belong to the cached videos."""
        if rows % self.videos or length != self.text_tokens:
            room = f"{self.text_tokens} tokens beside each of {self.videos} videos"
            raise ValueError(f"text.tokens has shape {[rows, length]}: the cache has room for {room}")
