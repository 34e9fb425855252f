"""Losses over a large vocabulary without its logits: a part of the tokens at a time, computed again in the backward.

256 tokens of a 256,384-word vocabulary have 262 MB of float32 logits, and a loss over them takes several times that.
Here at most ``max_logits`` of them exist at once, forward and backward. ``torch.nn.functional.linear_cross_entropy``
(torch 2.12) does the same for the cross-entropy alone; this takes any loss of a token's logits, the generalised KL
included, and torch 2.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

Score = Callable[[torch.Tensor, slice], torch.Tensor]
"""Logits [n, V] of the tokens of a slice -> their losses [n], each a function of its own logits alone."""


def chunked_scores(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, score: Score, max_logits: int
) -> torch.Tensor:
    """``score(hidden @ weight.T + bias)``, differentiable in hidden, weight and bias.

    Args:
        hidden: [M, D].
        weight: [V, D]; whole, so this must be called where a sharded linear's weight is gathered: in its forward.
        bias: [V], or None.
        score: what is made of a part's logits; called twice for each, it must draw nothing. Gradients flow through
            its logits alone.
        max_logits: most numbers of a [n, V] tensor of logits, though one token's are always allowed.

    Returns:
        losses [M], of whatever type the score gives.
    """
    place = hidden.device.type
    if place != "meta" and torch.is_autocast_enabled(place):  # what the linear would do by itself
        dtype = torch.get_autocast_dtype(place)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _ChunkedScores.apply(hidden, weight, bias, score, max(1, max_logits // weight.shape[0]))


def parts(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover 0..count-1 in order."""
    return (slice(start, start + size) for start in range(0, count, size))


class _ChunkedScores(torch.autograd.Function):
    """See :func:`chunked_scores`; ``size`` is the number of tokens a part."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, score: Score, size: int
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.score, ctx.size = score, size
        losses = [score(F.linear(hidden[rows], weight, bias), rows) for rows in parts(len(hidden), size)]
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Sums over many parts are kept in float32: bfloat16 would round after each of them.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for rows in parts(len(hidden), ctx.size):
            part = hidden[rows]
            logits = F.linear(part, weight, bias).requires_grad_()
            with torch.enable_grad():
                losses = ctx.score(logits, rows)
            (grad_logits,) = torch.autograd.grad(losses, logits, grad[rows])
            del logits, losses
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, part)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0, dtype=torch.float32)
            del grad_logits  # before the next part's take their place
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left.T @ right``, without a second [V, D] tensor where the types allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total += left.T @ right
