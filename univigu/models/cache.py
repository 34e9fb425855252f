"""Keys and values that denoising steps share: those of the prompt, and of clean video."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [B, S, heads, head_dim], normalised and rotated: ready for attention."""


@dataclass
class LayerCache:
    """One block's share of an ``AttentionCache``."""

    room: int | None
    """Room in ``joint`` for texts, where video has none beside it; None: ``joint`` is not kept."""
    prompt: dict[bool, KeyValue] = field(default_factory=dict)
    """Of the cross-attention onto the encoded prompt, [B, S, ...]; True: of the text's own layer, if it has one."""
    joint: KeyValue | None = None
    """Of the self-attention over [video ; text], [B, N + L, ...]; each text step overwrites the last L."""


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
    text_tokens: int = 0
    """L, how many of the joint keys are of texts; the others are the video's."""

    @property
    def of_video(self) -> torch.Tensor | None:
        """The first block's values of the video [B, N, heads, head_dim]; None until they are kept."""
        joint = self.layers[0].joint if self.layers else None
        return None if joint is None else joint[1][:, : -self.text_tokens]

    def begin(self, prompt_embeds: torch.Tensor, num_layers: int, text_tokens: int) -> None:
        """Prepare for a pass with video and that many text tokens; a ValueError if it holds another prompt's keys."""
        if self.prompt_embeds is None:
            self.prompt_embeds = prompt_embeds
            self.layers = [LayerCache(self.text_tokens if self.keep_video else None) for _ in range(num_layers)]
        if not torch.equal(self.prompt_embeds, prompt_embeds):  # hooks that move a model's inputs may hand on a copy
            raise ValueError("cache: filled with another prompt's embeddings; take a new cache for each tensor of them")
        self.text_tokens = text_tokens or self.text_tokens

    def take_prompt(self, prompt_embeds: torch.Tensor) -> bool:
        """Replace the video's prompt by the text's; returns whether its keys are yet to be computed."""
        assert self.prompt_embeds is not None
        if self.layers[0].prompt and torch.equal(self.prompt_embeds, prompt_embeds):
            return False
        self.prompt_embeds = prompt_embeds
        for layer in self.layers:
            layer.prompt = {}
        return True
