"""Self-attention over two streams with one set of projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, _get_qkv_projections

from univigu.models.text import rotate_text, rotate_video

Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class VideoOnly:
    """Which samples' video queries attend to video keys alone, found once for all blocks."""

    rows: torch.Tensor
    """Their indices in the batch, at least one."""
    others: torch.Tensor
    """The indices of the other samples."""

    @classmethod
    def where(cls, clean: torch.Tensor) -> Self | None:
        """From a bool [B]; None where no sample is concerned."""
        rows, others = clean.nonzero()[:, 0], (~clean).nonzero()[:, 0]
        return cls(rows, others) if rows.numel() else None


def joint_attention(
    attn: WanAttention,
    video: torch.Tensor,
    text: torch.Tensor,
    rotary_v: Rotary,
    rotary_t: Rotary,
    text_mask: torch.Tensor | None = None,
    video_only: VideoOnly | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional self-attention over the concatenation [video ; text] with shared projections.

    Args:
        attn: a Wan self-attention layer.
        video, text: normalised streams [B, N, D] and [B, L, D].
        rotary_v, rotary_t: rotary tables of the two streams.
        text_mask: bool [B, L]; False hides a text key from every query.
        video_only: samples whose video queries attend to video keys alone, so that what the video computes does
            not depend on the text (two attention calls, no mask).

    Returns:
        the projected outputs of both streams, [B, N, D] and [B, L, D].
    """
    length_v, length_t = video.shape[1], text.shape[1]
    query_v, key_v, value_v = _project(attn, video)
    query_t, key_t, value_t = _project(attn, text)
    query_v, key_v = rotate_video(query_v, rotary_v), rotate_video(key_v, rotary_v)
    query_t, key_t = rotate_text(query_t, rotary_t), rotate_text(key_t, rotary_t)
    key, value = torch.cat([key_v, key_t], dim=1), torch.cat([value_v, value_t], dim=1)
    mask = None
    if text_mask is not None:  # [B, 1, 1, N + L]
        mask = torch.cat([text_mask.new_ones(text_mask.shape[0], length_v), text_mask], dim=1)[:, None, None]

    if video_only is None:
        query = torch.cat([query_v, query_t], dim=1)
        out_v, out_t = _attend(attn, query, key, value, mask).split([length_v, length_t], dim=1)
    else:
        out_t = _attend(attn, query_t, key, value, mask)
        rows, others = video_only.rows, video_only.others
        if others.numel() == 0:
            out_v = _attend(attn, query_v, key_v, value_v, None)
        else:
            own = _attend(attn, query_v[rows], key_v[rows], value_v[rows], None)
            rest = _attend(attn, query_v[others], key[others], value[others], None if mask is None else mask[others])
            out_v = torch.empty_like(query_v).index_copy(0, rows, own).index_copy(0, others, rest)
    output = torch.cat([out_v, out_t], dim=1).flatten(2, 3)
    output = attn.to_out[1](attn.to_out[0](output))
    video_out, text_out = output.split([length_v, length_t], dim=1)
    return video_out, text_out


def _project(attn: WanAttention, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value [B, S, heads, head_dim]; the RMSNorm spans the full width, before the heads part."""
    query, key, value = _get_qkv_projections(attn, states, None)  # type: ignore[arg-type]
    heads = (attn.heads, -1)
    return attn.norm_q(query).unflatten(2, heads), attn.norm_k(key).unflatten(2, heads), value.unflatten(2, heads)


def _attend(
    attn: WanAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    backend = getattr(attn.processor, "_attention_backend", None)  # set by model.set_attention_backend(...)
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend).type_as(query)
