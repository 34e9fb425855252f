"""The parts a text stream adds to Wan: time embedding, output head, rotary positions, checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_1d_rotary_pos_embed
from diffusers.models.normalization import FP32LayerNorm
from torch import nn

TextReader = Callable[[torch.Tensor, nn.Linear], torch.Tensor]
"""What to make of the text's last hidden states [B, L, D] and the linear that would turn them into logits."""


class TextTimeEmbedding(nn.Module):
    """The text stream's own copy of Wan's ``time_embedder`` and ``time_proj``.

    The sinusoid before it has no weights and is shared with the video stream.
    """

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
    """LayerNorm (weight only), modulation, linear; the linear starts at zero, so the first prediction is uniform."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = FP32LayerNorm(dim, eps=1e-5, bias=False)
        self.linear = nn.Linear(dim, out_features)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, text_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, reader: TextReader | None = None
    ) -> torch.Tensor:
        """Text states [B, L, D] with shift, scale [B, 1, D] -> [B, L, out_features], or what the reader makes of them.

        Args:
            reader: given the hidden states [B, L, D] and the linear instead of letting them make logits. It is called
                in here because this is where a sharded linear's weight is whole.
        """
        normed = self.norm_final(text_states.float()) * (1 + scale) + shift
        hidden = normed.type_as(text_states)
        return self.linear(hidden) if reader is None else reader(hidden, self.linear)


def text_rotary_table(places: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines, float32 [..., L, 1, head_dim] each, of places int64 [..., L] with base 10000.

    The sines of the first half are negative, so that a rotation is ``x * cos + roll(x, head_dim / 2) * sin``.
    """
    cos, sin = get_1d_rotary_pos_embed(
        head_dim, places.flatten(), theta=10000.0, use_real=True, repeat_interleave_real=False
    )  # both halves hold the same
    cos, sin, half = cos.unflatten(0, places.shape), sin.unflatten(0, places.shape), head_dim // 2
    return cos.unsqueeze(-2), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(-2)


def rotate_text(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Half-split rotary embedding, pairs (j, j + head_dim/2), in float32; states [B, L, heads, head_dim].

    It is diffusers' ``apply_rotary_emb`` in three operations instead of eight: with few tokens, calls are what costs.

    Args:
        rotary: of :func:`text_rotary_table`; None leaves the states as they are.
    """
    if rotary is None:
        return states
    cos, sin = rotary
    full = states.float()
    return torch.addcmul(full * cos, full.roll(full.shape[-1] // 2, dims=-1), sin).type_as(states)


def rotate_video(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Wan's interleaved rotary embedding, pairs (2j, 2j+1); states [B, N, heads, head_dim]."""
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(-2).type_as(states)


def check_text(
    config: Any,
    hidden_states: torch.Tensor | None,
    timestep: torch.Tensor | None,
    text_tokens: torch.Tensor,
    text_timestep: torch.Tensor | None,
    text_mask: torch.Tensor | None,
    text_places: torch.Tensor | None = None,
) -> None:
    """Refuse a forward pass's inputs that do not belong together.

    Args:
        config: the transformer's; the others are its ``forward``'s arguments, ``text_tokens`` given.

    Raises:
        ValueError: naming the argument, what it is and what was expected.
    """
    batch = (text_tokens if hidden_states is None else hidden_states).shape[0]
    if text_timestep is None:
        raise ValueError("text_timestep=None: text_tokens need a text_timestep [B]")
    for name, value in (("timestep", timestep), ("text_timestep", text_timestep)):
        if value is not None and value.shape != (batch,):
            raise ValueError(f"{name} has shape {list(value.shape)}: expected [{batch}], one time a sample")
    embedding = config.text_flow == "embedding"
    if embedding != text_tokens.is_floating_point() or text_tokens.ndim != (3 if embedding else 2):
        expected = "float states [B, L, D]" if embedding else "integer ids [B, L]"
        raise ValueError(
            f"text_tokens is {text_tokens.dtype} {list(text_tokens.shape)}: "
            f"the {config.text_flow} flow expects {expected}"
        )
    if text_tokens.shape[0] != batch:
        raise ValueError(f"text_tokens has {text_tokens.shape[0]} rows: expected {batch}, as hidden_states")
    positions = config.text_positions
    if 0 < positions < text_tokens.shape[1]:
        raise ValueError(f"text_tokens has {text_tokens.shape[1]} positions: the model has {positions}")
    if text_mask is not None and (text_mask.dtype != torch.bool or text_mask.shape != text_tokens.shape[:2]):
        raise ValueError(
            f"text_mask is {text_mask.dtype} {list(text_mask.shape)}: expected bool {list(text_tokens.shape[:2])}"
        )
    if text_places is not None and (text_places.dtype != torch.int64 or text_places.shape != text_tokens.shape[:2]):
        raise ValueError(
            f"text_places is {text_places.dtype} {list(text_places.shape)}: "
            f"expected int64 {list(text_tokens.shape[:2])}"
        )
