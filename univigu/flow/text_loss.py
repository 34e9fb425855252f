"""Functions of the text's logits over a large vocabulary, without the logits of all tokens at once.

256 tokens of a 256,384-word vocabulary have 262 MB of float32 logits, and a loss over them takes several times that.
Here at most ``max_logits`` of them exist at a time, in the forward and in the backward pass, which computes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from univigu.flow.text import CorruptedText


@dataclass(frozen=True)
class PerToken:
    """A function of each token's logits; a :data:`univigu.flow.inputs.TextReader`."""

    function: Callable[[torch.Tensor, CorruptedText, torch.Tensor], torch.Tensor]
    """Of logits [b, l, V], texts and times [b]; its result [b, l, ...] for a token depends on that token's only."""
    corrupted: CorruptedText
    t: torch.Tensor
    """Flow times [B]."""
    max_logits: int
    """See :class:`univigu.flow.objective.FlowOptions`."""

    def __call__(self, hidden: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """The function's result [B, L, ...], given hidden states [B, L, D] and the linear layer D -> V."""
        shape, vocab_size = self.corrupted.tokens.shape, linear.out_features
        if shape.numel() * vocab_size <= self.max_logits:
            return self.function(linear(hidden), self.corrupted, self.t)
        hidden, times = hidden.flatten(0, 1), self.t[:, None].expand(shape).flatten()
        flat = CorruptedText(*(x.flatten(0, 1) for x in self.corrupted))

        def part(hidden: torch.Tensor, rows: slice) -> torch.Tensor:
            """Each token as a text of its own."""
            return self.function(linear(hidden)[:, None], CorruptedText(*(x[rows, None] for x in flat)), times[rows])

        size = max(1, self.max_logits // vocab_size)
        parts = [slice(start, start + size) for start in range(0, len(hidden), size)]
        results = [
            checkpoint(part, hidden[rows], rows, use_reentrant=False, preserve_rng_state=False) for rows in parts
        ]
        return torch.cat(results).squeeze(1).unflatten(0, shape)
