"""The text's loss of one forward pass: over all its logits, or over a part of the tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from univigu.flow.chunked import chunked_scores, parts
from univigu.flow.inputs import TextReader
from univigu.flow.text import CorruptedText, TextFlow


@dataclass(frozen=True)
class TextScore:
    """Losses of corrupted texts; see :meth:`univigu.flow.text.TextFlow.loss` for the first five fields."""

    flow: TextFlow
    corrupted: CorruptedText
    t: torch.Tensor
    table: torch.Tensor | None
    kind: str
    max_logits: int
    """See :class:`univigu.flow.objective.FlowOptions`."""

    @property
    def in_parts(self) -> bool:
        """Whether the logits of all tokens are too many."""
        return self.corrupted.tokens.numel() * self.flow.vocab_size > self.max_logits

    @property
    def reader(self) -> TextReader | None:
        """What the model's forward must be given: logits in parts exist in its head only."""
        return self.read if self.in_parts and not self.flow.needs_table else None

    def losses(self, output: torch.Tensor) -> torch.Tensor:
        """The model's ``text`` output as losses, float32 [B, L]."""
        if not self.in_parts:
            return self.flow.loss(output, self.corrupted, self.t, self.table, self.kind)
        if not self.flow.needs_table:
            return output  # of self.read
        flat, size = output.flatten(0, 1), max(1, self.max_logits // self.flow.vocab_size)
        losses = [
            checkpoint(self._loss, flat[rows], rows, self.table, use_reentrant=False) for rows in parts(len(flat), size)
        ]
        return torch.cat(losses).view_as(self.corrupted.tokens)

    def read(self, hidden: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """Losses [B, L] of the head's hidden states [B, L, D]."""
        losses = chunked_scores(hidden.flatten(0, 1), linear.weight, linear.bias, self._loss, self.max_logits)
        return losses.view_as(self.corrupted.tokens)

    def _loss(self, output: torch.Tensor, rows: slice, table: torch.Tensor | None = None) -> torch.Tensor:
        """Losses [n] of the output [n, V or D] for a slice of all tokens, each as a text of its own."""
        part = CorruptedText(*(None if x is None else x.flatten(0, 1)[rows, None] for x in self.corrupted))  # type: ignore[arg-type]
        times = self.t[:, None].expand_as(self.corrupted.tokens).flatten()[rows]
        return self.flow.loss(output[:, None], part, times, table, self.kind)[:, 0]
