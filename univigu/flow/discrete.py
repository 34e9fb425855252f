r"""The discrete mixture path: its loss and its draws, as plain functions.

At time t each token is independently the data's with probability t, else the source's (a uniform token or the mask).
A network gives the posterior :math:`p(x_1 | x_t)` of every token, and the process that jumps from x_t to y at rate

.. math:: \frac{1}{1 - t} \bigl( p(y) - \delta_{x_t}(y) \bigr)

carries the source to the data (Gat et al., 2024, arXiv:2407.15595, with :math:`\kappa_t = t`). With a vocabulary of
256k tokens one [B, L, V] tensor costs more than the network, so nothing here makes float64 copies, one-hots or noise
of that shape.
"""

from __future__ import annotations

import torch

from univigu.flow.random import Generators, rand
from univigu.flow.time import check_step, expand_time

_TINY = 2.0**-24  # spacing of float32 numbers below 1


def jump_probability(t: float, t_next: float) -> float:
    r"""Probability that a token jumps to its draw :math:`\hat x \sim p` between two times.

    The rate integrated over the step, with p held constant:

    .. math:: 1 - \exp\Bigl(-\int_t^{t'} \frac{ds}{1-s}\Bigr) = \frac{t' - t}{1 - t}

    so the share of tokens that have jumped is t, for any number of steps. A ValueError unless 0 <= t <= t_next <= 1.
    """
    check_step(t, t_next)
    return 1.0 if t_next == 1.0 else (t_next - t) / (1.0 - t)


def cross_entropy(logits: torch.Tensor, x_1: torch.Tensor) -> torch.Tensor:
    """``-log softmax(logits)[x_1]`` of every token.

    Args:
        logits: [B, L, V] of any float type.
        x_1: data tokens, int64 [B, L] in 0..V-1.

    Returns:
        float32 [B, L].
    """
    logits = logits.float()
    return logits.logsumexp(dim=-1) - logits.gather(-1, x_1.unsqueeze(-1)).squeeze(-1)


def generalized_kl(logits: torch.Tensor, x_1: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""The generalised KL divergence of the learned jump rates from the true ones, for every token.

    .. math:: \frac{1}{1-t} \bigl( s - p(x_t) - (1-s) \ln p(x_1) \bigr), \qquad s = 1[x_t = x_1]

    with :math:`p = \mathrm{softmax}(\text{logits})` (Shaul et al., 2024, arXiv:2412.03487: an evidence lower bound
    when averaged over t). An x_t outside the vocabulary, which is how the mask is written, has no logit: there
    p(x_t) = 0. The value is never negative, and 0 where p is certain of x_1.

    Args:
        logits: [B, L, V] of any float type.
        x_1: data tokens, int64 [B, L] in 0..V-1.
        x_t: the path's tokens, int64 [B, L] in 0..V (V is the mask).
        t: flow times [B] in [0, 1]; at 1 the weight of the largest float32 below it is taken.

    Returns:
        float32 [B, L].
    """
    vocab_size = logits.shape[-1]
    logits = logits.float()
    # One gather for both tokens: its backward is one [B, L, V] buffer instead of two.
    both = torch.stack((x_1, x_t.clamp(max=vocab_size - 1)), dim=-1)  # [B, L, 2]
    log_p = logits.gather(-1, both) - logits.logsumexp(dim=-1, keepdim=True)
    log_p_data = log_p[..., 0]
    p_state = torch.where(x_t < vocab_size, log_p[..., 1].exp(), 0.0)
    divergence = torch.where(x_t == x_1, -torch.expm1(log_p_data), -p_state - log_p_data)  # [B, L]
    return divergence / (1.0 - expand_time(t, x_1)).clamp(min=_TINY)


def nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest likeliest tokens whose probabilities reach ``top_p`` (Holtzman et al., 2020, arXiv:1904.09751).

    Args:
        probabilities: [..., V].

    Returns:
        probabilities in descending order, not normalised, 0 outside the nucleus; and the order, int64 [..., V].
    """
    probabilities, order = probabilities.sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # of likelier ones; the likeliest always stays
    return torch.where(before < top_p, probabilities, 0.0), order


def sample_categorical(
    logits: torch.Tensor, temperature: float, generator: Generators = None, top_p: float = 1.0
) -> torch.Tensor:
    """Draw a token for every position by inverse CDF, from one uniform number each.

    Args:
        logits: [B, L, V] of any float type.
        temperature: p = softmax(logits / temperature); 0 takes the likeliest token and draws nothing.
        generator: see :data:`univigu.flow.random.Generators`.
        top_p: probability of the nucleus to draw from, see :func:`nucleus`; below 1 it costs a sort of the vocabulary.

    Returns:
        int64 [B, L]; a token of probability 0 is never drawn.
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
    """Masked tokens that a step reveals if the surest go first (as in Chang et al., 2022, arXiv:2202.04200).

    Of m masked tokens these are the ``ceil(probability * m)`` surest, which keeps the path's schedule.

    Args:
        masked: bool [B, L].
        confidence: of each token's draw, float [B, L] in [0, 1].
        probability: with which the path reveals a token in this step.

    Returns:
        bool [B, L].
    """
    counts = (masked.sum(dim=1, keepdim=True) * probability).ceil()
    confidence = torch.where(masked, confidence, -1.0)
    ranks = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return masked & (ranks < counts)
