"""The text's inputs of a forward pass of the transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

TextReader = Callable[[torch.Tensor, nn.Linear], torch.Tensor]
"""Computes an output from the text's last hidden states [B, L, D] and the linear layer that would give logits."""


class TextInputs(NamedTuple):
    """The text's inputs of one forward pass. A named tuple, so that FSDP, DDP and offloading find its tensors."""

    tokens: torch.Tensor
    """Ids [B, L], or for the ``embedding`` flow float states [B, L, D]."""
    timestep: torch.Tensor
    """Timestep 1000 * (1 - t) of the text, [B]."""
    mask: torch.Tensor | None = None
    """bool [B, L]; False hides a text token from every query. None shows all."""
    positions: torch.Tensor | None = None
    """Positions of the tokens in the text, int64 [B, L] from 0; None is 0 to L-1."""
    endpoint: torch.Tensor | None = None
    """The previous step's prediction of the data [B, L, D], for the ``embedding`` flow's self-conditioning."""
    reader: TextReader | None = None
    """Replaces the text output by a function of the head's hidden states, see ``univigu.models.text.TextHead``."""
    prompt_embeds: torch.Tensor | None = None
    """Embeddings [B, S, text_dim] of the prompt (or question) that only the text reads. None: the video's prompt."""
