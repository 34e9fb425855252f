"""The video's flow: the straight path from Gaussian noise to latents.

With noise z_0, data z_1 and flow time t,

    z_t = (1 - t) z_0 + t z_1        velocity u = dz_t/dt = z_1 - z_0

(Lipman et al., 2023, arXiv:2210.02747, with sigma_min = 0; Liu et al., 2023, arXiv:2209.03003). Wan predicts
``noise - data = -u``. bfloat16 inputs are raised to float32 before any arithmetic.
"""

from __future__ import annotations

import torch

from univigu.flow.time import expand_time


def interpolate(noise: torch.Tensor, data: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The state ``z_t = (1 - t) noise + t data``; exactly the noise at t = 0 and the data at t = 1.

    noise and data have any shape [B, ...], t is [B] in [0, 1]; float32. A ValueError for shapes that do not fit.
    """
    _check_same_shape("noise", noise, data)
    time = expand_time(t, data)
    return (1.0 - time) * noise.float() + time * data.float()


def flow_matching_loss(prediction: torch.Tensor, noise: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Mean squared error of Wan's prediction against ``noise - data``, float32 [B]; all have shape [B, C, T, H, W]."""
    _check_same_shape("noise", noise, data)
    _check_same_shape("prediction", prediction, data)
    target = noise.float() - data.float()
    return (prediction.float() - target).square().flatten(1).mean(dim=1)


def _check_same_shape(name: str, tensor: torch.Tensor, reference: torch.Tensor) -> None:
    if tensor.shape != reference.shape:  # broadcasting would average over the wrong pairs without an error
        raise ValueError(f"{name}: shape {list(tensor.shape)} differs from {list(reference.shape)}")
