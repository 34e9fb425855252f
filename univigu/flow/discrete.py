r"""The discrete mixture path: its schedule, its losses and its draws, as plain functions.

Each token is independently the data's with probability :math:`\kappa_t = t^n`, else the source's (a uniform token
or the mask). A network gives the posterior :math:`p(x_1 | x_t)` of every token, and the process that jumps from
x_t to y at rate

.. math:: \frac{\dot\kappa_t}{1 - \kappa_t} \bigl( p(y) - \delta_{x_t}(y) \bigr)

carries the source to the data (Gat et al., 2024, arXiv:2407.15595). A vocabulary of 256k tokens makes one
[B, L, V] tensor cost more than the network, so nothing here makes float64 copies, one-hots or noise of that shape.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from univigu.flow.random import Generators, rand
from univigu.flow.time import expand_time

Jump = Literal["exact", "euler"]

_TINY = 2.0**-24  # what float32 can tell from 1


def kappa(t: torch.Tensor, exponent: float) -> torch.Tensor:
    """Probability ``t ** exponent`` that a token is the data's: float32, the shape of ``t``."""
    return t.float() ** exponent


def jump_rate(t: torch.Tensor, exponent: float) -> torch.Tensor:
    r"""The rate :math:`\dot\kappa/(1-\kappa) = n t^{n-1} / (1 - t^n)`: float32, the shape of ``t``, finite.

    It is infinite at t = 1, and at t = 0 if n < 1; there the value at the nearest float32 time inside is taken, so
    that a weight never turns 0 * inf into NaN.
    """
    t = t.float().clamp(_TINY, 1.0 - _TINY)
    return exponent * t ** (exponent - 1.0) / -torch.expm1(exponent * torch.log(t))


def jump_probability(t: float, t_next: float, exponent: float, jump: Jump = "exact") -> float:
    r"""Probability that a token jumps to its draw :math:`\hat x \sim p` between two times.

    ``euler`` freezes the rate at t over the step h = t' - t:

    .. math:: 1 - \exp\Bigl(-h \frac{\dot\kappa_t}{1-\kappa_t}\Bigr)

    ``exact`` integrates it. Since :math:`\dot\kappa/(1-\kappa) = -\frac{d}{dt} \ln(1-\kappa)`,

    .. math:: 1 - \exp\Bigl(-\int_t^{t'} \frac{\dot\kappa_s}{1-\kappa_s} ds\Bigr) = 1 - \frac{1-\kappa_{t'}}{1-\kappa_t}

    and with p held over the step this is the jump process itself: after one jump or many, the token is
    distributed as p. So ``exact`` keeps the share of jumped tokens at kappa for every number of steps, where
    ``euler`` lags behind (for n > 1 its first step moves nothing, and the last must make up for it; for n < 1 its
    first step moves everything).

    Args:
        t, t_next: flow times, 0 <= t <= t_next <= 1.
        exponent: n > 0.
        jump: which of the two.

    Returns:
        A number in [0, 1]; 1 if t_next is 1, where the sampler takes its draw.

    Raises:
        ValueError: the times are out of order or range.
    """
    if not 0.0 <= t <= t_next <= 1.0:
        raise ValueError(f"t, t_next: must satisfy 0 <= t <= t_next <= 1, got {t}, {t_next}")
    if t_next == 1.0:
        return 1.0
    if t_next == t:
        return 0.0
    kept = -math.expm1(exponent * math.log(t)) if t > 0 else 1.0  # 1 - kappa(t)
    if jump == "exact":
        return 1.0 + math.expm1(exponent * math.log(t_next)) / kept
    if t == 0.0 and exponent < 1.0:
        return 1.0
    return -math.expm1(-(t_next - t) * exponent * t ** (exponent - 1.0) / kept)


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


def generalized_kl_per_token(
    logits: torch.Tensor, x_1: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, exponent: float = 1.0
) -> torch.Tensor:
    r"""The generalised KL divergence of the learned jump rates from the true ones, for every token.

    .. math:: \frac{\dot\kappa_t}{1-\kappa_t} \bigl( s - p(x_t) - (1-s) \ln p(x_1) \bigr), \qquad s = 1[x_t = x_1]

    with :math:`p = \mathrm{softmax}(\text{logits})` (Shaul et al., 2024, arXiv:2412.03487: an evidence lower bound
    when averaged over t). An x_t outside the vocabulary, which is how the mask is written, has no logit: there
    p(x_t) = 0. The value is never negative, and 0 where p is certain of x_1.

    Args:
        logits: [B, L, V] of any float type.
        x_1: data tokens, int64 [B, L] in 0..V-1.
        x_t: the path's tokens, int64 [B, L] in 0..V (V is the mask).
        t: flow times [B] in [0, 1); the weight grows as 1/(1-t).
        exponent: n of kappa = t^n.

    Returns:
        float32 [B, L].

    Raises:
        ValueError: t is not [B].
    """
    vocab_size = logits.shape[-1]
    logits = logits.float()
    # One gather for both tokens: its backward is one [B, L, V] buffer instead of two.
    both = torch.stack((x_1, x_t.clamp(max=vocab_size - 1)), dim=-1)  # [B, L, 2]
    log_p = logits.gather(-1, both) - logits.logsumexp(dim=-1, keepdim=True)
    log_p_data = log_p[..., 0]
    p_state = torch.where(x_t < vocab_size, log_p[..., 1].exp(), 0.0)
    divergence = torch.where(x_t == x_1, -torch.expm1(log_p_data), -p_state - log_p_data)  # [B, L]
    return jump_rate(expand_time(t, x_1), exponent) * divergence


def generalized_kl(
    logits: torch.Tensor, x_1: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, exponent: float = 1.0
) -> torch.Tensor:
    """The mean of :func:`generalized_kl_per_token` over [B, L]: a float32 scalar; same arguments."""
    return generalized_kl_per_token(logits, x_1, x_t, t, exponent).mean()


def sample_categorical(
    logits: torch.Tensor, temperature: float, generator: Generators = None, top_p: float = 1.0
) -> torch.Tensor:
    """Draw a token for every position by inverse CDF, from one uniform number each.

    Args:
        logits: [B, L, V] of any float type.
        temperature: p = softmax(logits / temperature); 0 takes the likeliest token and draws nothing.
        generator: see :data:`univigu.flow.random.Generators`.
        top_p: draw from the fewest likeliest tokens whose probabilities reach this sum (Holtzman et al., 2020,
            arXiv:1904.09751); below 1 it costs a sort of the vocabulary.

    Returns:
        int64 [B, L]; a token of probability 0 is never drawn.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    order = None
    if top_p < 1.0:
        probabilities, order = probabilities.sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities  # of likelier ones; the likeliest always stays
        probabilities = torch.where(before < top_p, probabilities, 0.0)
    cdf = probabilities.cumsum_(dim=-1)
    # The sum is 1 up to rounding. The largest uniform number, 1 - 2^-24, times it still rounds to less than it.
    uniform = rand(logits.shape[:-1], generator, logits.device).unsqueeze(-1) * cdf[..., -1:]
    drawn = torch.searchsorted(cdf, uniform, right=True)
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)


def reveal_surest(masked: torch.Tensor, confidence: torch.Tensor, probability: float, threshold: float) -> torch.Tensor:
    """Which masked tokens a step reveals if the surest go first (as in Chang et al., 2022, arXiv:2202.04200).

    Of m masked tokens the ``ceil(probability * m)`` surest, which keeps to the path's schedule, and besides every one
    that is sure enough; a threshold of 1 adds none.

    Args:
        masked: bool [B, L].
        confidence: of each token's draw, float [B, L] in [0, 1].
        probability: with which the path reveals a token in this step.
        threshold: the confidence at which a token need not wait for its turn.

    Returns:
        bool [B, L].
    """
    counts = (masked.sum(dim=1, keepdim=True) * probability).ceil()
    confidence = torch.where(masked, confidence, -1.0)
    ranks = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    ahead = confidence >= threshold if threshold < 1.0 else torch.zeros_like(masked)
    return masked & ((ranks < counts) | ahead)
