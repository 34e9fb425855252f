"""The video's flow: the straight path from Gaussian noise to latents, and its conversions.

With noise z_0, data z_1 and flow time t,

    z_t = (1 - t) z_0 + t z_1        velocity u = dz_t/dt = z_1 - z_0

(Lipman et al., 2023, arXiv:2210.02747, with sigma_min = 0; Liu et al., 2023, arXiv:2209.03003). Wan predicts
``noise - data = -u``. All results are float32: bfloat16 inputs are raised first, never the result afterwards.
"""

from __future__ import annotations

import torch

from univigu.flow.time import expand_time


def interpolate(noise: torch.Tensor, data: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The state ``z_t = (1 - t) noise + t data``; exactly the noise at t = 0 and the data at t = 1.

    Args:
        noise, data: [B, C, T, H, W] (any shape [B, ...]).
        t: flow times [B] in [0, 1].

    Returns:
        float32, the shape of ``data``.

    Raises:
        ValueError: the shapes of noise and data differ, or t is not [B].
    """
    _check_same_shape("noise", noise, data)
    time = expand_time(t, data)
    return (1.0 - time) * noise.float() + time * data.float()


def velocity(noise: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """``u = data - noise``: float32, same shape. Raises ValueError if the shapes differ."""
    _check_same_shape("noise", noise, data)
    return data.float() - noise.float()


def velocity_from_prediction(prediction: torch.Tensor) -> torch.Tensor:
    """Wan's prediction (noise - data) as a velocity (data - noise): float32, same shape."""
    return -prediction.float()


def prediction_from_velocity(u: torch.Tensor) -> torch.Tensor:
    """A velocity (data - noise) as Wan's prediction (noise - data): float32, same shape."""
    return -u.float()


def data_from_velocity(z_t: torch.Tensor, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Where the straight path leads: ``z_1 = z_t + (1 - t) u``; arguments and result as in :func:`interpolate`."""
    _check_same_shape("u", u, z_t)
    return z_t.float() + (1.0 - expand_time(t, z_t)) * u.float()


def noise_from_velocity(z_t: torch.Tensor, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Where the straight path came from: ``z_0 = z_t - t u``; arguments and result as in :func:`interpolate`."""
    _check_same_shape("u", u, z_t)
    return z_t.float() - expand_time(t, z_t) * u.float()


def flow_matching_loss(prediction: torch.Tensor, noise: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Mean squared error of Wan's prediction against ``noise - data``, one number a sample.

    Args:
        prediction, noise, data: [B, C, T, H, W].

    Returns:
        float32 [B], the mean over C, T, H, W.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape("prediction", prediction, data)
    target = prediction_from_velocity(velocity(noise, data))
    return (prediction.float() - target).square().flatten(1).mean(dim=1)


def _check_same_shape(name: str, tensor: torch.Tensor, reference: torch.Tensor) -> None:
    if tensor.shape != reference.shape:  # broadcasting would quietly average over the wrong pairs
        raise ValueError(f"{name}: shape {list(tensor.shape)} differs from {list(reference.shape)}")
