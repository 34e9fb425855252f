"""Time conventions, stated once and converted only here.

* Flow time ``t`` in [0, 1]: 0 is noise, 1 is data; float32 [B].
* Noise level ``sigma = 1 - t``, as diffusers' flow-matching schedulers count it.
* ``timestep = 1000 * sigma``: what Wan's time embedding is given; 0 is clean, fractions are allowed.

Everything is float32 whatever comes in: above 512 neighbouring bfloat16 numbers lie 4 apart, so bfloat16
timesteps would merge the steps of a sampler where most of them are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from univigu.flow.random import Generators, rand, randn

NUM_TRAIN_TIMESTEPS = 1000
"""Wan's timestep at pure noise."""


def _float32(value: torch.Tensor | float) -> torch.Tensor:
    return torch.as_tensor(value).to(torch.float32)


def sigma_from_time(t: torch.Tensor | float) -> torch.Tensor:
    """``sigma = 1 - t``: float32, same shape."""
    return 1.0 - _float32(t)


def time_from_sigma(sigma: torch.Tensor | float) -> torch.Tensor:
    """``t = 1 - sigma``: float32, same shape."""
    return 1.0 - _float32(sigma)


def timestep_from_sigma(sigma: torch.Tensor | float) -> torch.Tensor:
    """``timestep = 1000 * sigma``: float32, same shape."""
    return NUM_TRAIN_TIMESTEPS * _float32(sigma)


def to_timestep(t: torch.Tensor | float) -> torch.Tensor:
    """``timestep = 1000 * (1 - t)``: float32, same shape."""
    return timestep_from_sigma(sigma_from_time(t))


def from_timestep(timestep: torch.Tensor | float) -> torch.Tensor:
    """``t = 1 - timestep / 1000``: float32, same shape."""
    return time_from_sigma(_float32(timestep) / NUM_TRAIN_TIMESTEPS)


def shift_sigma(sigma: torch.Tensor | float, shift: float) -> torch.Tensor:
    r"""Move noise levels up, since more pixels need more noise to lose the same information.

    .. math:: \sigma' = \frac{s \sigma}{1 + (s - 1) \sigma}

    Eq. 23 of Esser et al., 2024, arXiv:2403.03206; Wan2.1 takes s = 3 at 480p and 5 at 720p.

    Args:
        sigma: noise levels in [0, 1]; 0 and 1 stay where they are.
        shift: s > 0; 1 changes nothing.

    Returns:
        float32, same shape.

    Raises:
        ValueError: ``shift`` is not a positive finite number.
    """
    check_positive("shift", shift)
    sigma = _float32(sigma)
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def unshift_sigma(sigma: torch.Tensor | float, shift: float) -> torch.Tensor:
    """The inverse of :func:`shift_sigma`, which is the shift by ``1 / shift``."""
    check_positive("shift", shift)
    return shift_sigma(sigma, 1.0 / shift)


def expand_time(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Times [B] as float32 [B, 1, ..., 1], to be multiplied with ``like`` [B, ...].

    Raises:
        ValueError: ``t`` is not one time a sample.
    """
    if t.shape != like.shape[:1]:
        raise ValueError(f"t: expected one time a sample, [{like.shape[0]}], got {list(t.shape)}")
    return _float32(t).view(-1, *[1] * (like.dim() - 1))


def check_positive(name: str, value: float) -> None:
    """Raise a ValueError naming the field unless ``value`` is a positive finite number."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: must be a positive finite number, got {value}")


@dataclass(frozen=True)
class VideoTimeSampling:
    """How training draws the video's flow times.

    A noise level is drawn, shifted (:func:`shift_sigma`) and turned into flow time.
    """

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """``uniform``: sigma uniform on (0, 1]. ``logit_normal``: logit(sigma) normal, which visits the ends less often
    (Esser et al., 2024, arXiv:2403.03206, section 3.1)."""
    mean: float = 0.0
    """Mean of logit(sigma) before the shift; above 0 is noisier. Used by ``logit_normal`` only."""
    std: float = 1.0
    """Standard deviation of logit(sigma), above 0. Used by ``logit_normal`` only."""
    shift: float = 3.0
    """Timestep shift s > 0; the sampler should use the same one. 1 is no shift."""

    def __post_init__(self) -> None:
        if self.distribution not in ("uniform", "logit_normal"):
            raise ValueError(f"distribution: must be 'uniform' or 'logit_normal', got {self.distribution!r}")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean: must be a finite number, got {self.mean}")
        check_positive("std", self.std)
        check_positive("shift", self.shift)

    def sample(
        self, batch: int, device: torch.device | str | None = None, generator: Generators = None
    ) -> torch.Tensor:
        """Draw one flow time a sample: float32 [B] in [0, 1]."""
        if self.distribution == "uniform":
            sigma = 1.0 - rand((batch,), generator, device)  # (0, 1]: pure noise is where every sampler starts
        else:
            sigma = torch.sigmoid(self.mean + self.std * randn((batch,), generator, device))
        return time_from_sigma(shift_sigma(sigma, self.shift))


@dataclass(frozen=True)
class TextTimeSampling:
    """How training draws the text's flow times: ``t = (1 - eps) * u ** power`` with u uniform on [0, 1)."""

    power: float = 1.0
    """Above 0. 1 is uniform; above 1 favours noisy text, below 1 nearly clean text."""
    eps: float = 1e-3
    """Times stay at or below ``1 - eps``, where the generalised KL's weight ``kappa'/(1-kappa)`` is finite."""

    def __post_init__(self) -> None:
        check_positive("power", self.power)
        if not 1e-6 <= self.eps < 1:
            raise ValueError(f"eps: must lie in [1e-6, 1) to keep float32 times below 1, got {self.eps}")

    def sample(
        self, batch: int, device: torch.device | str | None = None, generator: Generators = None
    ) -> torch.Tensor:
        """Draw one flow time a sample: float32 [B] in [0, 1 - eps) (for power 1; else the end may be reached)."""
        return (1.0 - self.eps) * rand((batch,), generator, device) ** self.power
