"""The text's loss over a large vocabulary, without the logits of all tokens at once.

256 tokens of a 256,384-word vocabulary have 262 MB of float32 logits, and a loss over them takes several times that.
Here at most ``max_logits`` of them exist at a time, in the forward and in the backward pass, which computes them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from univigu.flow.text import CorruptedText, TextFlow


@dataclass(frozen=True)
class TextLoss:
    """Losses [B, L] of the text head's hidden states; a :data:`univigu.flow.inputs.TextReader`.

    The transformer calls it inside its head, where a sharded linear's weight is gathered.
    """

    flow: TextFlow
    corrupted: CorruptedText
    t: torch.Tensor
    """Flow times [B]."""
    kind: str
    """See :meth:`univigu.flow.text.TextFlow.loss`."""
    max_logits: int
    """See :class:`univigu.flow.objective.FlowOptions`."""

    def __call__(self, hidden: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """hidden: [B, L, D]; linear: D -> V."""
        tokens, vocab_size = self.corrupted.tokens, self.flow.vocab_size
        if tokens.numel() * vocab_size <= self.max_logits:
            return self.flow.loss(linear(hidden), self.corrupted, self.t, self.kind)
        hidden, times = hidden.flatten(0, 1), self.t[:, None].expand_as(tokens).flatten()
        flat = CorruptedText(*(x.flatten(0, 1) for x in self.corrupted))

        def part(hidden: torch.Tensor, rows: slice) -> torch.Tensor:
            """Each token as a text of its own."""
            corrupted = CorruptedText(*(x[rows, None] for x in flat))
            return self.flow.loss(linear(hidden)[:, None], corrupted, times[rows], self.kind)

        size = max(1, self.max_logits // vocab_size)
        parts = [slice(start, start + size) for start in range(0, len(hidden), size)]
        losses = [checkpoint(part, hidden[rows], rows, use_reentrant=False, preserve_rng_state=False) for rows in parts]
        return torch.cat(losses).view_as(tokens)
