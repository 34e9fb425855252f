"""The discrete mixture path: its loss and its draws, as plain functions.

At time t each token is independently the data's with probability t, else the source's (a uniform token or the mask).
A network gives the posterior p(x_1 | x_t) of every token, and the process that jumps from x_t to y at the rate

    (p(y) - [y = x_t]) / (1 - t)

carries the source to the data (Gat et al., 2024, arXiv:2407.15595, with kappa_t = t). With a vocabulary of
256k tokens one [B, L, V] tensor costs more than the network, so nothing here makes float64 copies, one-hots or noise
of that shape.
"""

from __future__ import annotations

import torch

from univigu.flow.random import Generators, rand


def jump_probability(t: float, t_next: float) -> float:
    """Probability that a token jumps to its draw x ~ p between the times 0 <= t <= t' <= 1.

    The rate integrated with p held constant, ``1 - exp(-integral ds / (1 - s))``; the share that has jumped is then t.
    """
    return 1.0 if t_next == 1.0 else (t_next - t) / (1.0 - t)


def cross_entropy(logits: torch.Tensor, x_1: torch.Tensor) -> torch.Tensor:
    """``-log softmax(logits)[x_1]`` of every token, float32 [B, L]: logits [B, L, V], x_1 int64 [B, L] in 0..V-1."""
    logits = logits.float()
    return logits.logsumexp(dim=-1) - logits.gather(-1, x_1.unsqueeze(-1)).squeeze(-1)


def nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest likeliest tokens whose probabilities reach ``top_p`` (Holtzman et al., 2020, arXiv:1904.09751).

    Returns the probabilities [..., V] in descending order, 0 outside the nucleus, not normalised; and their order.
    """
    probabilities, order = probabilities.sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # of likelier ones; the likeliest always stays
    return torch.where(before < top_p, probabilities, 0.0), order


def sample_categorical(
    logits: torch.Tensor, temperature: float, generator: Generators = None, top_p: float = 1.0
) -> torch.Tensor:
    """Draw a token int64 [B, L] for every position by inverse CDF, from one uniform number each; logits [B, L, V].

    p = softmax(logits / temperature); temperature 0 takes the likeliest token and draws nothing. ``top_p`` below 1
    draws from the ``nucleus``, at the cost of a sort of the vocabulary. A token of probability 0 is never drawn.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities, order = torch.softmax(logits.float() / temperature, dim=-1), None
    if top_p < 1.0:
        probabilities, order = nucleus(probabilities, top_p)
    cdf = probabilities.cumsum_(dim=-1)
    # The sum is 1 up to rounding. The largest uniform number, 1 - 2^-24, times it still rounds to less than it.
    uniform = rand(logits.shape[:-1], generator, logits.device).unsqueeze(-1) * cdf[..., -1:]
    drawn = torch.searchsorted(cdf, uniform, right=True)
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)


def reveal_surest(masked: torch.Tensor, confidence: torch.Tensor, probability: float) -> torch.Tensor:
    """Masked tokens [B, L] that a step reveals if the surest go first (as in Chang et al., 2022, arXiv:2202.04200).

    Of m masked tokens these are the ``ceil(probability * m)`` whose draws have the highest confidence [B, L] in [0, 1],
    which keeps the path's schedule.
    """
    counts = (masked.sum(dim=1, keepdim=True) * probability).ceil()
    confidence = torch.where(masked, confidence, -1.0)
    ranks = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return masked & (ranks < counts)
