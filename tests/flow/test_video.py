"""The video's straight path, its conversions and its loss."""

from __future__ import annotations

import pytest
import torch

from univigu.flow.video import flow_matching_loss, interpolate

SHAPE = (3, 4, 2, 3, 5)  # B, C, T, H, W


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def test_path_is_noise_at_zero_and_data_at_one_exactly(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    noise, data = pair
    z = interpolate(noise, data, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(z[0], noise[0])
    assert torch.equal(z[1], data[1])
    torch.testing.assert_close(z[2], 0.75 * noise[2] + 0.25 * data[2])


def test_velocity_is_the_derivative_of_the_path(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    noise, data = (x.requires_grad_(False) for x in pair)
    t = torch.tensor([0.2, 0.5, 0.9])
    _, slope = torch.autograd.functional.jvp(lambda s: interpolate(noise, data, s), t, torch.ones(3))
    torch.testing.assert_close(slope, data - noise)


def test_loss_is_the_mean_square_error_of_each_sample(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    noise, data = pair
    offset = torch.tensor([0.0, 0.5, 2.0]).view(3, 1, 1, 1, 1)
    loss = flow_matching_loss(noise - data + offset, noise, data)
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.25, 4.0]), rtol=1e-5, atol=1e-12)
    assert float(flow_matching_loss(data - noise, noise, data).min()) > 1.0  # a velocity is not a prediction
    alone = flow_matching_loss((noise - data + offset)[1:2], noise[1:2], data[1:2])
    torch.testing.assert_close(alone, loss[1:2], rtol=0, atol=0)


def test_bfloat16_goes_in_and_float32_comes_out(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    noise, data = (x.bfloat16() for x in pair)
    t = torch.tensor([0.1, 0.5, 0.9])
    z = interpolate(noise, data, t)
    assert z.dtype == torch.float32
    assert not torch.equal(z, z.bfloat16().float())  # computed in float32, not only returned in it
    torch.testing.assert_close(z, interpolate(noise.float(), data.float(), t), rtol=0, atol=0)
    assert flow_matching_loss(noise, noise, data).dtype == torch.float32


def test_wrong_shapes_are_named(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    noise, data = pair
    t = torch.zeros(3)
    with pytest.raises(ValueError, match=r"noise: shape \[1, 4, 2, 3, 5\] differs from \[3, 4, 2, 3, 5\]"):
        interpolate(noise[:1], data, t)
    with pytest.raises(ValueError, match="prediction: shape"):
        flow_matching_loss(noise[:, :1], noise, data)
    with pytest.raises(ValueError, match="t: expected one time a sample"):
        interpolate(noise, data, torch.zeros(1))
