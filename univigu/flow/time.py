"""Time conventions, stated once and converted only here.

* Flow time ``t`` in [0, 1]: 0 is noise, 1 is data; float32 [B].
* Noise level ``sigma = 1 - t``, as in diffusers' flow-matching schedulers.
* ``timestep = 1000 * sigma``, the input of Wan's time embedding; 0 is clean, fractions are allowed.

Everything is float32 whatever the input: above 512 neighbouring bfloat16 numbers are 4 apart, so bfloat16 timesteps
would merge neighbouring steps of a sampler.
"""

from __future__ import annotations

import math

import torch

from univigu.flow.random import Device, Generators, rand

NUM_TRAIN_TIMESTEPS = 1000
"""Wan's timestep at pure noise."""
MAX_TEXT_TIME = 1.0 - 1e-3
"""Largest text time in training, so that ``1 / (1 - t)`` is finite."""


def time_from_sigma(sigma: torch.Tensor | float) -> torch.Tensor:
    """``t = 1 - sigma``: float32, same shape."""
    return 1.0 - _float32(sigma)


def to_timestep(t: torch.Tensor | float) -> torch.Tensor:
    """``timestep = 1000 * (1 - t)``: float32, same shape."""
    return NUM_TRAIN_TIMESTEPS * (1.0 - _float32(t))


def shift_sigma(sigma: torch.Tensor | float, shift: float) -> torch.Tensor:
    """Raise noise levels, since more pixels need more noise to lose the same information.

        sigma' = s sigma / (1 + (s - 1) sigma)

    Eq. 23 of Esser et al., 2024, arXiv:2403.03206; Wan2.1 uses s = 3 at 480p and 5 at 720p. s > 0, and 1 changes
    nothing; sigma in [0, 1], of which 0 and 1 do not change; float32, same shape.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift: must be a positive finite number, got {shift}")
    sigma = _float32(sigma)
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def expand_time(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Times [B] as float32 [B, 1, ..., 1], to be multiplied with ``like`` [B, ...]; a ValueError for other shapes."""
    if t.shape != like.shape[:1]:
        raise ValueError(f"t: expected one time a sample, [{like.shape[0]}], got {list(t.shape)}")
    return _float32(t).view(-1, *[1] * (like.dim() - 1))


def _float32(value: torch.Tensor | float) -> torch.Tensor:
    return torch.as_tensor(value).to(torch.float32)


def sample_video_times(batch: int, shift: float, device: Device = None, generator: Generators = None) -> torch.Tensor:
    """The video's flow times in training, float32 [B] in [0, 1): sigma uniform on (0, 1], then shifted."""
    sigma = 1.0 - rand((batch,), generator, device)  # not 0: every sampler starts at pure noise
    return time_from_sigma(shift_sigma(sigma, shift))


def sample_text_times(batch: int, power: float, device: Device = None, generator: Generators = None) -> torch.Tensor:
    """The text's flow times in training: ``t = MAX_TEXT_TIME * u ** power``, u uniform on [0, 1); float32 [B].

    A power of 1 is uniform; above 1 favours noisy text, below 1 nearly clean text.
    """
    return MAX_TEXT_TIME * rand((batch,), generator, device) ** power
