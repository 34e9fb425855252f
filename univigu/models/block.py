"""One block of the unified transformer: joint attention, and an FFN for each modality."""

from __future__ import annotations

import copy
from typing import Any

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
from univigu.models.text import NO_TEXT, TextStream


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
        own = text_attention == "own"
        self.attn1_t: WanAttention | None = copy.deepcopy(self.attn1) if own else None
        self.attn2_t: WanAttention | None = copy.deepcopy(self.attn2) if own else None
        self.ffn_t: FeedForward | None = None
        if separate_text_ffn:
            self.ffn_t = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor | None,  # [B, N, D]; None: only the text, with the video's cached keys
        encoder_hidden_states: torch.Tensor | None,  # [B, S, D]
        temb: torch.Tensor | None,  # [B, 1 or N, 6, D]; [B, 6, D] or [B, N, 6, D] in Wan's own forward
        rotary_emb: Any,  # the video's rotary table
        text: TextStream = NO_TEXT,
        video_only: VideoOnly = False,
        cache: LayerCache | None = None,
        for_text: bool = False,  # leave out what only the video's output needs
    ) -> Any:
        """The states of video and text, None for a stream that is left out; a tensor where Wan's own forward calls."""
        if text.states is None and cache is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        # Both streams share one table of modulation; each has its own time.
        shift_v, scale_v, gate_v, *ffn_v = self._modulation(temb)
        shift_t, scale_t, gate_t, *ffn_t = self._modulation(text.modulation)

        # 1. Self-attention over [video ; text]
        normed_v = modulate(self.norm1, hidden_states, shift_v, scale_v)
        normed_t = modulate(self.norm1, text.states, shift_t, scale_t)
        if hidden_states is None:
            assert cache is not None
            out_v, out_t = None, text_attention(self.attn1_t or self.attn1, normed_t, text, cache)
        elif text.states is None:
            assert cache is not None
            out_v, out_t = video_attention(self.attn1, self.attn1_t, normed_v, rotary_emb, cache, for_text), None
        else:
            out_v, out_t = joint_attention(
                self.attn1, self.attn1_t, normed_v, normed_t, rotary_emb, text, video_only, cache, for_text
            )
        video, states = _gated(hidden_states, out_v, gate_v), _gated(text.states, out_t, gate_t)

        # 2. Cross-attention onto the prompt, both streams as queries
        if cache is not None and cache.room and text.states is None:
            cache = None  # its texts have their own prompt
        prompt, own = encoder_hidden_states, self.attn2_t or self.attn2
        if text.context is None and own is self.attn2:
            video, states = apply_together(lambda x: self._read_prompt(own, x, prompt, cache), video, states)
        else:
            video = self._read_prompt(self.attn2, video, prompt, cache)
            states = self._read_prompt(own, states, prompt if text.context is None else text.context, cache)

        # 3. Feed-forward, one expert for each modality
        return self._feed_forward(self.ffn, video, *ffn_v), self._feed_forward(self.ffn_t or self.ffn, states, *ffn_t)

    def _modulation(self, temb: torch.Tensor | None) -> Any:
        """Shift, scale and gate of the attention and of the FFN; None for a stream that is left out."""
        return (None,) * 6 if temb is None else (self.scale_shift_table + temb.float()).unbind(2)

    def _read_prompt(self, attn: WanAttention, states: Any, context: Any, cache: LayerCache | None) -> Any:
        if states is None:
            return None
        normed = self.norm2(states.float()).type_as(states)
        return states + prompt_attention(attn, normed, context, cache, of_text=attn is self.attn2_t)

    def _feed_forward(self, expert: nn.Module, states: Any, shift: Any, scale: Any, gate: Any) -> Any:
        normed = modulate(self.norm3, states, shift, scale)
        return None if normed is None else _gated(states, expert(normed), gate)


register_block(UniViGUTransformerBlock)


def modulate(norm: nn.Module, states: Any, shift: Any, scale: Any) -> Any:
    """``norm(states) * (1 + scale) + shift`` in float32, returned in the states' type; None for no states."""
    return None if states is None else (norm(states.float()) * (1 + scale) + shift).type_as(states)


def _gated(states: Any, update: Any, gate: Any) -> Any:
    """``states + update * gate`` in float32, returned in the states' type; None for no update."""
    return None if update is None else (states.float() + update.float() * gate).type_as(states)
