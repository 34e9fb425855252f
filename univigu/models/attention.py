"""Joint self-attention of the two streams, and cross-attention whose keys and values can be cached."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from einops import rearrange, repeat
from torch.nn.functional import pad

from univigu.models.cache import KeyValue, LayerCache
from univigu.models.internals import attention_backend
from univigu.models.text import Rotary, TextStream, rotate_text, rotate_video

Rotate = Callable[[torch.Tensor], torch.Tensor]
VideoOnly = bool | torch.Tensor
"""Whether video queries attend to video keys only: the same for all samples, or bool [B]."""


def joint_attention(
    attn: WanAttention,
    attn_t: WanAttention | None,
    video: torch.Tensor,
    text: torch.Tensor,
    rotary_v: Rotary,
    stream: TextStream,
    video_only: VideoOnly = False,
    cache: LayerCache | None = None,
    for_text: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Bidirectional self-attention over [video ; text], normalised streams [B, N, D] and [B, L, D].

    Args:
        attn: Wan's self-attention layer.
        attn_t: the text's own layer. It projects the text, and the video's keys and values that text queries read.
            None uses ``attn`` for both.
        stream: for the text's positions, and keys that are hidden from every query.
        video_only: samples whose video does not depend on the text.
        cache: where to keep the keys and values for ``text_attention``.
        for_text: leave out the video's output.
    """
    own, key_mask = attn_t or attn, stream.key_mask
    rotate_v, rotate_t = partial(rotate_video, rotary=rotary_v), partial(rotate_text, rotary=stream.rotary)
    query_t, of_text = _query(own, text, rotate_t), _key_value(own, text, rotate_t)
    shown = _key_value(own, video, rotate_v)
    read_by_text = _concatenate(shown, of_text)
    if cache is not None and cache.room is not None:
        cache.joint = read_by_text
    if for_text:
        return None, _project_out(own, _attend(attn, query_t, *read_by_text, key_mask))

    query_v = _query(attn, video, rotate_v)
    of_video = shown if attn_t is None else _key_value(attn, video, rotate_v)
    if attn_t is None and video_only is False:
        query = torch.cat([query_v, query_t], dim=1)
        out_v, out_t = _attend(attn, query, *read_by_text, key_mask).split([video.shape[1], text.shape[1]], dim=1)
    else:
        out_t = _attend(attn, query_t, *read_by_text, key_mask)
        if isinstance(video_only, torch.Tensor):  # the samples differ: a mask hides the text's keys
            hidden = repeat(~video_only, "b -> b 1 1 l", l=text.shape[1])
            mask = pad(hidden, (video.shape[1], 0), value=True)
            key_mask = mask if key_mask is None else mask & key_mask
        if video_only is True:
            out_v = _attend(attn, query_v, *of_video, None)
        else:
            out_v = _attend(attn, query_v, *_concatenate(of_video, of_text), key_mask)
    if attn_t is not None:
        return _project_out(attn, out_v), _project_out(attn_t, out_t)
    return apply_together(partial(_project_out, attn), out_v, out_t)


def video_attention(
    attn: WanAttention,
    attn_t: WanAttention | None,
    video: torch.Tensor,
    rotary: Rotary,
    cache: LayerCache,
    for_text: bool,
) -> torch.Tensor | None:
    """The video's half of ``joint_attention`` without text; keeps keys and values for texts where there is room."""
    rotate = partial(rotate_video, rotary=rotary)
    of_video = _key_value(attn, video, rotate)
    if cache.room:
        shown = of_video if attn_t is None else _key_value(attn_t, video, rotate)
        cache.joint = pad(shown[0], (0, 0, 0, 0, 0, cache.room)), pad(shown[1], (0, 0, 0, 0, 0, cache.room))
    return None if for_text else _project_out(attn, _attend(attn, _query(attn, video, rotate), *of_video, None))


def _concatenate(video: KeyValue, text: KeyValue) -> KeyValue:
    """Keys and values of [video ; text]."""
    return torch.cat([video[0], text[0]], dim=1), torch.cat([video[1], text[1]], dim=1)


def apply_together(
    function: Callable[[torch.Tensor], torch.Tensor], video: torch.Tensor | None, text: torch.Tensor | None
) -> Any:
    """Apply a token-wise function to both streams, [B, N, ...] and [B, L, ...]; None where a stream is left out.

    It is one call unless only text has gradients, where a concatenation would also backpropagate zeros through the
    video.
    """
    if video is None or text is None:
        return None if video is None else function(video), None if text is None else function(text)
    if text.requires_grad and not video.requires_grad:
        return function(video), function(text)
    return function(torch.cat([video, text], dim=1)).split([video.shape[1], text.shape[1]], dim=1)


def text_attention(attn: WanAttention, text: torch.Tensor, stream: TextStream, cache: LayerCache) -> torch.Tensor:
    """The text's half of ``joint_attention``, with the video's keys and values from the cache.

    The text's keys and values overwrite the end of the cached buffers, so that the video's are not copied. Several
    texts about one video [B * K, L, D] attend in turn.
    """
    assert cache.joint is not None
    rotate, key_mask = partial(rotate_text, rotary=stream.rotary), stream.key_mask
    query, (own_key, own_value) = _query(attn, text, rotate), _key_value(attn, text, rotate)
    key, value = cache.joint
    start, count, heads = key.shape[1] - text.shape[1], len(text) // len(key), []
    for number in range(count):
        rows = slice(number, None, count)
        key[:, start:], value[:, start:] = own_key[rows], own_value[rows]
        heads.append(_attend(attn, query[rows], key, value, None if key_mask is None else key_mask[rows]))
    return _project_out(attn, heads[0] if count == 1 else torch.stack(heads, dim=1).flatten(0, 1))


def prompt_attention(
    attn: WanAttention, states: torch.Tensor, context: Any, cache: LayerCache | None, of_text: bool = False
) -> torch.Tensor:
    """Cross-attention of queries [B, S, D] onto the prompt [B, P, D], which a cache that holds it replaces."""
    if cache is None:
        return attn(states, context, None, None)
    if of_text not in cache.prompt:
        cache.prompt[of_text] = _key_value(attn, context)
    return _project_out(attn, _attend(attn, _query(attn, states), *cache.prompt[of_text], None))


def _query(attn: WanAttention, states: torch.Tensor, rotate: Rotate | None = None) -> torch.Tensor:
    """Query [B, S, heads, head_dim]; RMSNorm over the full width, before the heads."""
    query = rearrange(attn.norm_q(attn.to_q(states)), "b s (h d) -> b s h d", h=attn.heads)
    return query if rotate is None else rotate(query)


def _key_value(attn: WanAttention, states: torch.Tensor, rotate: Rotate | None = None) -> KeyValue:
    key = rearrange(attn.norm_k(attn.to_k(states)), "b s (h d) -> b s h d", h=attn.heads)
    value = rearrange(attn.to_v(states), "b s (h d) -> b s h d", h=attn.heads)
    return key if rotate is None else rotate(key), value


def _project_out(attn: WanAttention, heads: torch.Tensor) -> torch.Tensor:
    out = attn.to_out[0](heads.flatten(2, 3))
    return attn.to_out[1](out) if attn.training else out  # dropout


def _attend(
    attn: WanAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=attention_backend(attn)).type_as(query)
