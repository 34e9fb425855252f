"""The text stream's inputs and the modules it adds to Wan: time embedding, output head, rotary positions."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_1d_rotary_pos_embed
from diffusers.models.normalization import FP32LayerNorm
from torch import nn

from univigu.flow.text import TextInputs, TextReader
from univigu.models.cache import AttentionCache
from univigu.models.weights import WeightDtype, dtype_of

Rotary = tuple[torch.Tensor, torch.Tensor]


class TextStream(NamedTuple):
    """The text between blocks."""

    states: torch.Tensor | None = None
    """[B, L, D]; None: there is no text."""
    modulation: torch.Tensor | None = None
    """Projected time embedding, [B, 1, 6, D]."""
    rotary: Rotary | None = None
    """Rotary table; None for learned positions."""
    key_mask: torch.Tensor | None = None
    """bool [B, 1, 1, N + L]; False hides a key of [video ; text] from every query."""
    context: torch.Tensor | None = None
    """The text's own prompt [B, S, D]; None: the video's."""


NO_TEXT = TextStream()
TEXT_TABLES = ("vocab_embed", "text_position_embed", "text_endpoint_proj", "text_head")
"""Modules of the text stream that are no copies of Wan's."""


def is_text_parameter(name: str) -> bool:
    """Whether a transformer's parameter belongs to the text stream and not to Wan."""
    return copied_from(name) != name


def copied_from(name: str) -> str | None:
    """The weight of Wan that a transformer's parameter starts as; None for the text's tables, which are drawn."""
    if set(TEXT_TABLES) & set(name.split(".")):
        return None
    return re.sub(r"_t(?=\.|$)", "", name.replace("time_embedding_t.", "condition_embedder."))


@torch.no_grad()
def init_text_tables(model: Any, dtype: WeightDtype | None = None) -> None:
    """Draw the weights of a transformer's text stream that are no copies of Wan's; given a dtype, anew on the CPU."""
    for name in TEXT_TABLES:
        if (module := getattr(model, name)) is None:
            continue
        if dtype is not None:
            for part, parameter in module.named_parameters():
                parameter.data = parameter.data.to(dtype_of(model, f"{name}.{part}", dtype))
            module.to_empty(device="cpu")
        for part, parameter in module.named_parameters():
            if "embed" in name:
                # Small beside what attention adds, so that the token hides nothing that is read off the video.
                parameter.normal_(std=0.1)
            else:  # the first prediction is uniform
                parameter.fill_(float(part == "norm_final.weight"))


class TextTimeEmbedding(nn.Module):
    """The text stream's own copy of Wan's ``time_embedder`` and ``time_proj``."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.time_embedder = TimestepEmbedding(in_channels=freq_dim, time_embed_dim=dim)
        self.act_fn = nn.SiLU()
        self.time_proj = nn.Linear(dim, 6 * dim)

    def forward(self, sinusoid: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Map a sinusoid [B, freq_dim] to the time embedding [B, D] and the blocks' modulation [B, 6, D]."""
        weight_dtype = self.time_embedder.linear_1.weight.dtype
        temb = self.time_embedder(sinusoid.to(weight_dtype)).to(dtype)
        return temb, self.time_proj(self.act_fn(temb)).unflatten(1, (6, -1))


class TextHead(nn.Module):
    """LayerNorm (weight only), modulation, linear."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.norm_final = FP32LayerNorm(dim, eps=1e-5, bias=False)
        self.linear = nn.Linear(dim, vocab_size)

    def forward(
        self, states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, reader: TextReader | None = None
    ) -> torch.Tensor:
        """Text states [B, L, D] with shift and scale [B, 1, D] -> logits [B, L, V], or the reader's output.

        The reader is called in here because a sharded linear's weight is gathered only during this forward.
        """
        hidden = (self.norm_final(states.float()) * (1 + scale) + shift).type_as(states)
        return self.linear(hidden) if reader is None else reader(hidden, self.linear)


def text_rotary_table(positions: torch.Tensor, head_dim: int) -> Rotary:
    """Cosines and signed sines, float32 [..., L, 1, head_dim] each, of positions int64 [..., L] with base 10000.

    The sines of the first half are negative, so that a rotation is ``x * cos + roll(x, head_dim / 2) * sin``.
    """
    cos, sin = get_1d_rotary_pos_embed(
        head_dim, positions.flatten(), theta=10000.0, use_real=True, repeat_interleave_real=False
    )  # both halves hold the same
    cos, sin, half = cos.unflatten(0, positions.shape), sin.unflatten(0, positions.shape), head_dim // 2
    return cos.unsqueeze(-2), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(-2)


def rotate_text(states: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
    """Half-split rotary embedding, pairs (j, j + head_dim/2), in float32; states [B, L, heads, head_dim].

    Equal to diffusers' ``apply_rotary_emb``, in three operations instead of eight. Without a table it does nothing.
    """
    if rotary is None:
        return states
    cos, sin = rotary
    full = states.float()
    return torch.addcmul(full * cos, full.roll(full.shape[-1] // 2, dims=-1), sin).type_as(states)


def rotate_video(states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Wan's interleaved rotary embedding, pairs (2j, 2j+1); states [B, N, heads, head_dim]."""
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(-2).type_as(states)


def check_inputs(
    model: Any,
    text: TextInputs | None,
    video: torch.Tensor | None,
    timestep: torch.Tensor | None,
    cache: AttentionCache | None,
    predict_video: bool,
) -> None:
    """Raise a ValueError naming the first inputs of a forward pass that do not fit together."""
    config = model.config
    if model.is_cache_enabled:
        raise ValueError("enable_cache: its cached blocks know no text and no prompt's keys; call disable_cache()")
    if cache is not None and torch.is_grad_enabled():
        raise ValueError("cache: its keys and values carry no gradients; use it under torch.no_grad()")
    cached, room = (None, 0) if cache is None else (cache.of_video, cache.text_tokens)
    if video is None and (text is None or cached is None):
        raise ValueError("hidden_states=None: expected text and a cache filled by a pass with video")
    if text is None:
        if predict_video:
            return
        assert timestep is not None
        if config.clean_video_reads_text or bool((timestep != 0).any()):
            raise ValueError("predict_video=False: without text it is for clean video that does not read text")
        if not room:
            raise ValueError("predict_video=False: without text it fills a cache, AttentionCache(text_tokens=...)")
        return
    embedding = config.text_flow == "embedding"
    if embedding != text.tokens.is_floating_point() or text.tokens.ndim != (3 if embedding else 2):
        expected = f"the {config.text_flow} flow expects {'float states [B, L, D]' if embedding else 'ids [B, L]'}"
        raise ValueError(f"text.tokens is {text.tokens.dtype} {list(text.tokens.shape)}: {expected}")
    batch, length = text.tokens.shape[:2]
    if video is not None and video.shape[0] != batch:
        raise ValueError(f"text.tokens has {batch} rows: expected {video.shape[0]}, as hidden_states")
    if video is not None and cache is not None and text.prompt_embeds is not None:
        raise ValueError("text.prompt_embeds: with a cache only in passes without video")
    if video is None and cached is not None and (batch % len(cached) or length != room):
        found = f"{room} tokens beside each of {len(cached)} videos"
        raise ValueError(f"text.tokens has shape {[batch, length]}: the cache has room for {found}")
    for name, value, dtype, shape in (
        ("timestep", timestep, None, [batch, *([] if timestep is None else timestep.shape[1:2])]),
        ("text.timestep", text.timestep, None, [batch]),
        ("text.mask", text.mask, torch.bool, [batch, length]),
        ("text.positions", text.positions, torch.int64, [batch, length]),
        ("text.endpoint", text.endpoint, None, list(text.tokens.shape)),
    ):
        if value is not None and (list(value.shape) != shape or dtype not in (None, value.dtype)):
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)}: expected {dtype or 'float'} {shape}")
    if 0 < config.text_positions < length:
        raise ValueError(f"text.tokens has {length} positions: the model has {config.text_positions}")
