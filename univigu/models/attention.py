"""Self-attention over two streams with one set of projections."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, _get_qkv_projections

from univigu.models.text import rotate_text, rotate_video

Rotary = tuple[torch.Tensor, torch.Tensor]


def joint_attention(
    attn: WanAttention,
    video: torch.Tensor,
    text: torch.Tensor,
    rotary_v: Rotary,
    rotary_t: Rotary,
    text_mask: torch.Tensor | None = None,
    video_only: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional self-attention over the concatenation [video ; text] with shared projections.

    Args:
        attn: a Wan self-attention layer.
        video, text: normalised streams [B, N, D] and [B, L, D].
        rotary_v, rotary_t: rotary tables of the two streams.
        text_mask: bool [B, L]; False hides a text key from every query.
        video_only: bool [B]; in these rows video queries attend to video keys alone, so that what the video
            computes does not depend on the text (two attention calls, no mask).

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
        out_v = torch.empty_like(query_v)
        for rows, own_keys in ((video_only, True), (~video_only, False)):
            if not rows.any():
                continue
            if own_keys:
                part = _attend(attn, query_v[rows], key_v[rows], value_v[rows], None)
            else:
                part = _attend(attn, query_v[rows], key[rows], value[rows], None if mask is None else mask[rows])
            out_v = out_v.masked_scatter(rows[:, None, None, None], part)
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
