"""Self-attention over two streams with one set of projections, and cross-attention whose keys can be kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, _get_qkv_projections

from univigu.models.cache import KeyValue, LayerCache
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
    rotary_t: Rotary | None,
    text_mask: torch.Tensor | None = None,
    video_only: VideoOnly | None = None,
    cache: LayerCache | None = None,
    attn_t: WanAttention | None = None,
    text_projects_video: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bidirectional self-attention over the concatenation [video ; text] with shared projections.

    Args:
        attn: a Wan self-attention layer.
        video, text: normalised streams [B, N, D] and [B, L, D].
        rotary_v, rotary_t: rotary tables of the two streams; the text may go without.
        text_mask: bool [B, L]; False hides a text key from every query.
        video_only: samples whose video queries attend to video keys alone, so that what the video computes does
            not depend on the text (two attention calls, no mask).
        cache: where to keep the keys and values for :func:`text_attention`.
        attn_t: a layer whose projections the text takes instead; still all attend to all.
        text_projects_video: whether the keys and values under which text queries find the video are made by
            ``attn_t``, too, and not those that the video's own queries find.

    Returns:
        the projected outputs of both streams, [B, N, D] and [B, L, D].
    """
    length_v, length_t = video.shape[1], text.shape[1]
    query_v, key_v, value_v = _project(attn, video)
    query_t, key_t, value_t = _project(attn_t or attn, text)
    query_v, key_v = rotate_video(query_v, rotary_v), rotate_video(key_v, rotary_v)
    query_t, key_t = rotate_text(query_t, rotary_t), rotate_text(key_t, rotary_t)
    alone, of_text = (key_v, value_v), (key_t, value_t)
    seen = alone  # of the video, by the text
    if text_projects_video:
        assert attn_t is not None
        key_r, value_r = _project_key_value(attn_t, video)
        seen = rotate_video(key_r, rotary_v), value_r
    read = _concatenate(seen, of_text)
    mask = _key_mask(text_mask, length_v)
    if cache is not None and cache.keep_video:
        cache.joint = read

    if video_only is None and not text_projects_video:
        query = torch.cat([query_v, query_t], dim=1)
        out_v, out_t = _attend(attn, query, *read, mask).split([length_v, length_t], dim=1)
    else:
        out_t = _attend(attn, query_t, *read, mask)
        out_v = _attend_video(attn, query_v, alone, of_text, mask, video_only)
    if attn_t is not None:
        return _project_out(attn, out_v), _project_out(attn_t, out_t)
    return apply_together(lambda states: _project_out(attn, states), out_v, out_t)


def _concatenate(video: KeyValue, text: KeyValue) -> KeyValue:
    """Keys and values of [video ; text]."""
    return torch.cat([video[0], text[0]], dim=1), torch.cat([video[1], text[1]], dim=1)


def _attend_video(
    attn: WanAttention,
    query: torch.Tensor,
    video: KeyValue,
    text: KeyValue,
    mask: torch.Tensor | None,
    video_only: VideoOnly | None,
) -> torch.Tensor:
    """The video's queries [B, N, heads, head_dim]: on both streams, or on the video alone in some samples or all."""
    if video_only is None:
        return _attend(attn, query, *_concatenate(video, text), mask)
    rows, others = video_only.rows, video_only.others
    if others.numel() == 0:
        return _attend(attn, query, *video, None)
    own = _attend(attn, query[rows], video[0][rows], video[1][rows], None)
    both = _concatenate((video[0][others], video[1][others]), (text[0][others], text[1][others]))
    rest = _attend(attn, query[others], *both, None if mask is None else mask[others])
    return torch.empty_like(query).index_copy(0, rows, own).index_copy(0, others, rest)


def apply_together(
    function: Callable[[torch.Tensor], torch.Tensor], video: torch.Tensor, text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply what works on each token alone to both streams, [B, N, ...] and [B, L, ...], in one call where it pays.

    In a concatenation the backward pass would go through both; where only the text needs it (beside the clean video
    of a frozen generator), the video's half of it would be work on zeros.
    """
    if text.requires_grad and not video.requires_grad:
        return function(video), function(text)
    video_out, text_out = function(torch.cat([video, text], dim=1)).split([video.shape[1], text.shape[1]], dim=1)
    return video_out, text_out


def text_attention(
    attn: WanAttention,
    text: torch.Tensor,
    rotary_t: Rotary | None,
    cache: LayerCache,
    text_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The text's half of :func:`joint_attention` beside the video's kept keys and values; [B, L, D] -> [B, L, D].

    ``attn`` is the layer with the text's projections.

    The text's own keys and values take their place behind the video's in the same buffers: nothing of the video's is
    copied, which at 32,760 video tokens would cost as much as the text's whole computation.
    """
    assert cache.joint is not None
    key, value = cache.joint
    length_v = key.shape[1] - text.shape[1]
    query_t, key_t, value_t = _project(attn, text)
    key[:, length_v:] = rotate_text(key_t, rotary_t)
    value[:, length_v:] = value_t
    out = _attend(attn, rotate_text(query_t, rotary_t), key, value, _key_mask(text_mask, length_v))
    return _project_out(attn, out)


def prompt_attention(
    attn: WanAttention, states: torch.Tensor, context: torch.Tensor | None, cache: LayerCache | None
) -> torch.Tensor:
    """Wan's cross-attention onto the prompt; with a cache the prompt's keys and values are computed once.

    Args:
        attn: a Wan cross-attention layer.
        states: queries [B, S, D].
        context: the prompt [B, P, D]; not looked at once the cache holds it.
        cache: None computes everything, as training does; image-to-video layers always do.
    """
    if cache is None or attn.add_k_proj is not None:
        return attn(states, context, None, None)
    if cache.prompt is None:
        assert context is not None
        cache.prompt = _project_key_value(attn, context)
    query = attn.norm_q(attn.to_q(states)).unflatten(2, (attn.heads, -1))
    return _project_out(attn, _attend(attn, query, *cache.prompt, None))


def _project(attn: WanAttention, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value [B, S, heads, head_dim]; the RMSNorm spans the full width, before the heads part."""
    query, key, value = _get_qkv_projections(attn, states, None)  # type: ignore[arg-type]
    heads = (attn.heads, -1)
    return attn.norm_q(query).unflatten(2, heads), attn.norm_k(key).unflatten(2, heads), value.unflatten(2, heads)


def _project_key_value(attn: WanAttention, states: torch.Tensor) -> KeyValue:
    """Key and value [B, S, heads, head_dim] of what others query: the prompt, or the video where text reads it."""
    if not attn.fused_projections:
        key, value = attn.to_k(states), attn.to_v(states)
    elif attn.is_cross_attention:
        key, value = attn.to_kv(states).chunk(2, dim=-1)
    else:
        _, key, value = attn.to_qkv(states).chunk(3, dim=-1)
    return attn.norm_k(key).unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))


def _project_out(attn: WanAttention, heads: torch.Tensor) -> torch.Tensor:
    out = attn.to_out[0](heads.flatten(2, 3))
    return attn.to_out[1](out) if attn.training else out  # the dropout; calling it for nothing takes its time


def _key_mask(text_mask: torch.Tensor | None, length_v: int) -> torch.Tensor | None:
    """Bool [B, L] -> [B, 1, 1, N + L]: every video key may be attended to."""
    if text_mask is None:
        return None
    return torch.cat([text_mask.new_ones(text_mask.shape[0], length_v), text_mask], dim=1)[:, None, None]


def _attend(
    attn: WanAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    backend = getattr(attn.processor, "_attention_backend", None)  # set by model.set_attention_backend(...)
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend).type_as(query)
