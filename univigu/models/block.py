"""One block of the unified transformer: shared attention, an FFN for each modality."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import nn

from univigu.models.attention import (
    Rotary,
    VideoOnly,
    apply_together,
    joint_attention,
    prompt_attention,
    text_attention,
)
from univigu.models.cache import LayerCache


class UniViGUTransformerBlock(WanTransformerBlock):
    """A Wan block whose attention is shared by both streams and whose FFN is not.

    Args:
        ffn_dim: inner width of both FFNs.
        separate_text_ffn: False sends text through the video's FFN, to measure what an own one is worth.
        separate_text_attention: True gives text its own projections in the self-attention.
        text_projects_video: True lets text read the video by keys and values of those projections, too.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        *args: Any,
        separate_text_ffn: bool = True,
        separate_text_attention: bool = False,
        text_projects_video: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, ffn_dim, *args, **kwargs)
        self.text_projects_video = text_projects_video
        self.attn1_t: WanAttention | None = copy.deepcopy(self.attn1) if separate_text_attention else None
        self.ffn_t: FeedForward | None = None
        if separate_text_ffn:
            self.ffn_t = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor | None,  # [B, N, D]; None: text alone, beside what the cache holds of the video
        encoder_hidden_states: torch.Tensor | None,  # [B, S, D]
        temb: torch.Tensor | None,  # [B, 6, D]
        rotary_emb: Rotary | None,
        text_states: torch.Tensor | None = None,  # [B, L, D]; None: video alone
        temb_t: torch.Tensor | None = None,  # [B, 6, D]
        rotary_t: Rotary | None = None,  # None: the text has no rotary positions
        text_mask: torch.Tensor | None = None,  # [B, L], True where a text key may be attended to
        video_only: VideoOnly | None = None,  # samples whose video queries must not see text keys
        cache: LayerCache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if hidden_states is None:
            assert text_states is not None and temb_t is not None and cache is not None
            return self._text_alone(text_states, temb_t, rotary_t, text_mask, cache)
        assert encoder_hidden_states is not None and temb is not None and rotary_emb is not None
        if text_states is None or temb_t is None:
            if cache is None:
                return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)  # type: ignore[arg-type]
            return self._video_alone(hidden_states, encoder_hidden_states, temb, rotary_emb, cache)

        # One table serves both streams; each brings its own time.
        shift_v, scale_v, gate_v, *ffn_v = self._modulation(temb)
        shift_t, scale_t, gate_t, *ffn_t = self._modulation(temb_t)

        # 1. Self-attention over [video ; text]
        video_out, text_out = joint_attention(
            self.attn1,
            modulate(self.norm1, hidden_states, shift_v, scale_v),
            modulate(self.norm1, text_states, shift_t, scale_t),
            rotary_emb,
            rotary_t,
            text_mask,
            video_only,
            cache,
            self.attn1_t,
            self.text_projects_video,
        )
        hidden_states = _gated(hidden_states, video_out, gate_v)
        text_states = _gated(text_states, text_out, gate_t)

        # 2. Cross-attention onto the prompt, both streams as queries
        hidden_states, text_states = apply_together(
            lambda states: self._read_prompt(states, encoder_hidden_states, cache), hidden_states, text_states
        )

        # 3. Feed-forward, one expert for each modality
        video = self._feed_forward(self.ffn, hidden_states, *ffn_v)
        return video, self._feed_forward(self._expert, text_states, *ffn_t)

    def _video_alone(
        self, video: torch.Tensor, context: torch.Tensor, temb: torch.Tensor, rotary_emb: Rotary, cache: LayerCache
    ) -> torch.Tensor:
        """What the parent computes, with the prompt's keys and values kept."""
        shift, scale, gate, *ffn = self._modulation(temb)
        attended = self.attn1(modulate(self.norm1, video, shift, scale), None, None, rotary_emb)
        video = self._read_prompt(_gated(video, attended, gate), context, cache)
        return self._feed_forward(self.ffn, video, *ffn)

    def _text_alone(
        self,
        text: torch.Tensor,
        temb_t: torch.Tensor,
        rotary_t: Rotary | None,
        mask: torch.Tensor | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        """The text's half of the joint computation, beside the video's keys and values of an earlier pass."""
        shift, scale, gate, *ffn = self._modulation(temb_t)
        attended = text_attention(
            self.attn1_t or self.attn1, modulate(self.norm1, text, shift, scale), rotary_t, cache, mask
        )
        text = self._read_prompt(_gated(text, attended, gate), None, cache)
        return self._feed_forward(self._expert, text, *ffn)

    def _read_prompt(
        self, states: torch.Tensor, context: torch.Tensor | None, cache: LayerCache | None
    ) -> torch.Tensor:
        normed = self.norm2(states.float()).type_as(states)
        return states + prompt_attention(self.attn2, normed, context, cache)

    def _feed_forward(
        self, expert: nn.Module, states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        return _gated(states, expert(modulate(self.norm3, states, shift, scale)), gate)

    @property
    def _expert(self) -> nn.Module:
        """The text's FFN."""
        return self.ffn if self.ffn_t is None else self.ffn_t

    def _modulation(self, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.scale_shift_table + temb.float()).chunk(6, dim=1)


def modulate(norm: nn.Module, states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``norm(states) * (1 + scale) + shift`` in float32, returned in the states' type."""
    return (norm(states.float()) * (1 + scale) + shift).type_as(states)


def _gated(states: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (states.float() + update.float() * gate).type_as(states)
