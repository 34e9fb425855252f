"""One block of the unified transformer: joint attention, and an FFN for each modality."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import nn

from univigu.models.attention import (
    VideoOnly,
    apply_together,
    joint_attention,
    prompt_attention,
    text_attention,
    video_attention,
)
from univigu.models.cache import LayerCache
from univigu.models.internals import register_block
from univigu.models.options import TextAttention
from univigu.models.text import Rotary


class TextStream(NamedTuple):
    """The text between blocks."""

    states: torch.Tensor
    """[B, L, D]."""
    modulation: torch.Tensor
    """Projected time embedding, [B, 1, 6, D]."""
    rotary: Rotary | None = None
    """Rotary table; None for learned positions."""
    key_mask: torch.Tensor | None = None
    """bool [B, 1, 1, N + L]; False hides a key of [video ; text]."""
    context: torch.Tensor | None = None
    """The text's own prompt [B, S, D]; None: the video's."""


class UniViGUTransformerBlock(WanTransformerBlock):
    """A Wan block with a text stream, see ``univigu.models.options.ArchitectureOptions``."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        *args: Any,
        separate_text_ffn: bool = True,
        text_attention: TextAttention = "shared",
    ) -> None:
        super().__init__(dim, ffn_dim, *args)
        self.attn1_t: WanAttention | None = copy.deepcopy(self.attn1) if text_attention == "own" else None
        self.ffn_t: FeedForward | None = None
        if separate_text_ffn:
            self.ffn_t = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor | None,  # [B, N, D]; None: only the text, with the video's cached keys
        encoder_hidden_states: torch.Tensor | None,  # [B, S, D]
        temb: torch.Tensor | None,  # [B, 1 or N, 6, D]; [B, 6, D] or [B, N, 6, D] in Wan's own forward
        rotary_emb: Rotary | None,
        text: TextStream | None = None,  # None: only the video
        video_only: VideoOnly = False,
        cache: LayerCache | None = None,
        for_text: bool = False,  # leave out what only the video's output needs
    ) -> Any:
        """The video's states, and the text's if there is text: a tensor or a tuple of two."""
        if hidden_states is None:
            assert text is not None and cache is not None
            return self._forward_text(text, cache)
        assert encoder_hidden_states is not None and temb is not None and rotary_emb is not None
        if text is None and cache is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)

        # Both streams share one table of modulation; each has its own time.
        shift_v, scale_v, gate_v, *ffn_v = self._modulation(temb)
        normed_v = modulate(self.norm1, hidden_states, shift_v, scale_v)
        if text is None:  # as the parent, with the prompt's cached keys, or keeping the video's own for texts
            assert cache is not None
            if cache.text_tokens:
                video_out = video_attention(self.attn1, self.attn1_t, normed_v, rotary_emb, cache, for_text)
                cache = None  # texts have their own prompt
            else:
                video_out = self.attn1(normed_v, None, None, rotary_emb)
            if video_out is None:
                return None
            alone = self._read_prompt(_gated(hidden_states, video_out, gate_v), encoder_hidden_states, cache)
            return self._feed_forward(self.ffn, alone, *ffn_v)
        shift_t, scale_t, gate_t, *ffn_t = self._modulation(text.modulation)
        normed_t = modulate(self.norm1, text.states, shift_t, scale_t)

        # 1. Self-attention over [video ; text]
        tables = (rotary_emb, text.rotary)
        video_out, text_out = joint_attention(
            self.attn1, self.attn1_t, normed_v, normed_t, *tables, text.key_mask, video_only, cache, for_text
        )
        states = _gated(text.states, text_out, gate_t)
        video = None if video_out is None else _gated(hidden_states, video_out, gate_v)

        # 2. Cross-attention onto the prompt, both streams as queries
        if video is not None and text.context is None:
            video, states = apply_together(lambda x: self._read_prompt(x, encoder_hidden_states, cache), video, states)
        else:
            video = None if video is None else self._read_prompt(video, encoder_hidden_states, cache)
            context = encoder_hidden_states if text.context is None else text.context
            states = self._read_prompt(states, context, cache)

        # 3. Feed-forward, one expert for each modality
        video = None if video is None else self._feed_forward(self.ffn, video, *ffn_v)
        return video, self._feed_forward(self.ffn_t or self.ffn, states, *ffn_t)

    def _forward_text(self, text: TextStream, cache: LayerCache) -> torch.Tensor:
        """The text's half of the joint computation, with the video's keys and values from the cache."""
        shift, scale, gate, *ffn = self._modulation(text.modulation)
        normed = modulate(self.norm1, text.states, shift, scale)
        attended = text_attention(self.attn1_t or self.attn1, normed, text.rotary, cache, text.key_mask)
        states = self._read_prompt(_gated(text.states, attended, gate), text.context, cache)
        return self._feed_forward(self.ffn_t or self.ffn, states, *ffn)

    def _read_prompt(
        self, states: torch.Tensor, context: torch.Tensor | None, cache: LayerCache | None
    ) -> torch.Tensor:
        normed = self.norm2(states.float()).type_as(states)
        return states + prompt_attention(self.attn2, normed, context, cache)

    def _feed_forward(
        self, expert: nn.Module, states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        return _gated(states, expert(modulate(self.norm3, states, shift, scale)), gate)

    def _modulation(self, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.scale_shift_table + temb.float()).unbind(2)


register_block(UniViGUTransformerBlock)


def modulate(norm: nn.Module, states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``norm(states) * (1 + scale) + shift`` in float32, returned in the states' type."""
    return (norm(states.float()) * (1 + scale) + shift).type_as(states)


def _gated(states: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (states.float() + update.float() * gate).type_as(states)
