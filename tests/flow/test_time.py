"""Time conversions, training-time distributions and per-sample random draws."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from univigu.flow.random import rand, randint, randn
from univigu.flow.time import (
    MAX_TEXT_TIME,
    expand_time,
    sample_text_times,
    sample_video_times,
    shift_sigma,
    time_from_sigma,
    to_timestep,
)

DRAWS = 20_000
# A Kolmogorov-Smirnov distance above this has probability 2 exp(-2 * 2.2^2) = 1e-4; the seeds are fixed.
KS_BOUND = 2.2 / math.sqrt(DRAWS)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ks_distance(samples: torch.Tensor, cdf: torch.Tensor) -> float:
    """Largest gap between an empirical distribution and ``cdf``, its theory's value at the sorted samples."""
    grid = torch.arange(1, len(samples) + 1, dtype=torch.float64) / len(samples)
    return float((cdf - grid).abs().max())


def test_conversions_agree_at_known_points() -> None:
    assert to_timestep(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1000.0, 750.0, 0.0]
    assert time_from_sigma(torch.tensor([1.0, 0.75, 0.0])).tolist() == [0.0, 0.25, 1.0]


def test_shift_matches_its_formula_keeps_the_ends_and_inverts() -> None:
    sigma = torch.linspace(0, 1, 101)
    expected = [3 * s / (1 + 2 * s) for s in sigma.double().tolist()]
    torch.testing.assert_close(shift_sigma(sigma, 3.0), torch.tensor(expected), rtol=1e-6, atol=0)
    assert shift_sigma(torch.tensor([0.0, 1.0]), 5.0).tolist() == [0.0, 1.0]
    for shift in (0.3, 1.0, 3.0, 5.0):  # the inverse is the shift by 1 / s
        torch.testing.assert_close(shift_sigma(shift_sigma(sigma, shift), 1 / shift), sigma, rtol=0, atol=1e-6)


def test_bfloat16_times_are_raised_before_arithmetic() -> None:
    # 0.01 apart in sigma is 10 timesteps; in bfloat16 1000 * sigma would be rounded to multiples of 4.
    sigma = torch.tensor([0.75390625, 0.7578125], dtype=torch.bfloat16)  # neighbours
    assert to_timestep(1 - sigma.float()).tolist() == [753.90625, 757.8125]
    for value in (shift_sigma(sigma, 3.0), time_from_sigma(sigma), to_timestep(sigma)):
        assert value.dtype == torch.float32
    assert expand_time(sigma, torch.zeros(2, 3, 4)).dtype == torch.float32


def test_expand_time_wants_one_time_a_sample() -> None:
    assert expand_time(torch.zeros(2), torch.zeros(2, 3, 4)).shape == (2, 1, 1)
    with pytest.raises(ValueError, match=r"t: expected one time a sample, \[2\], got \[3\]"):
        expand_time(torch.zeros(3), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_video_times_follow_the_shifted_distribution(shift: float) -> None:
    t = sample_video_times(DRAWS, shift, generator=seeded(0))
    assert t.dtype == torch.float32 and t.shape == (DRAWS,)
    assert float(t.min()) >= 0.0 and float(t.max()) < 1.0
    t = t.double().sort().values
    # P(t <= a) = P(sigma' >= 1 - a) = 1 - unshift(1 - a)
    cdf = 1 - (1 - t) / (shift - (shift - 1) * (1 - t))
    assert ks_distance(t, cdf) < KS_BOUND
    other = 1 - (1 - t) / (2 * shift - (2 * shift - 1) * (1 - t))
    assert ks_distance(t, other) > KS_BOUND


def test_video_times_may_be_pure_noise_and_are_never_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for extreme in (0.0, 1.0 - 2.0**-24):
        monkeypatch.setattr("univigu.flow.time.rand", lambda shape, *_, value=extreme: torch.full(shape, value))
        assert float(sample_video_times(1, 1.0)) == extreme


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_text_times_stay_below_one_and_follow_their_power(power: float) -> None:
    t = sample_text_times(DRAWS, power, generator=seeded(2))
    assert t.dtype == torch.float32
    assert float(t.min()) >= 0.0 and float(t.max()) <= MAX_TEXT_TIME
    t = t.double().sort().values
    assert ks_distance(t, (t / MAX_TEXT_TIME) ** (1 / power)) < KS_BOUND
    assert ks_distance(t, (t / MAX_TEXT_TIME) ** (1.2 / power)) > KS_BOUND


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf])
def test_a_shift_out_of_range_is_named(shift: float) -> None:
    with pytest.raises(ValueError, match=f"shift: must be a positive finite number, got {shift}"):
        shift_sigma(0.5, shift)


@pytest.mark.parametrize(
    "draw",
    [
        lambda shape, generator: randn(shape, generator),
        lambda shape, generator: rand(shape, generator),
        lambda shape, generator: randint(1000, shape, generator),
    ],
    ids=["randn", "rand", "randint"],
)
def test_a_sample_alone_draws_what_it_draws_in_a_batch(draw) -> None:  # type: ignore[no-untyped-def]
    batch = draw((3, 4, 5), [seeded(10), seeded(11), seeded(12)])
    for i in range(3):
        assert torch.equal(batch[i : i + 1], draw((1, 4, 5), [seeded(10 + i)]))
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(draw((3, 4, 5), seeded(7)), draw((3, 4, 5), seeded(7)))
    torch.manual_seed(3)
    first = draw((3, 4, 5), None)
    torch.manual_seed(3)
    assert torch.equal(first, draw((3, 4, 5), None))
    with pytest.raises(ValueError, match="generator: 2 generators for a batch of 3"):
        draw((3, 4, 5), [seeded(0), seeded(1)])


@pytest.mark.parametrize("seeds", [[5], [5, 6]])
def test_randn_gives_the_numbers_of_diffusers(seeds: list[int]) -> None:
    shape = (len(seeds), 2, 3, 4)
    theirs = randn_tensor(shape, [seeded(s) for s in seeds], dtype=torch.float32)
    assert torch.equal(randn(shape, [seeded(s) for s in seeds]), theirs)
    assert torch.equal(randn(shape, seeded(5)), randn_tensor(shape, seeded(5), dtype=torch.float32))


def test_draws_have_the_range_and_type_asked_for() -> None:
    assert randn((2, 3)).dtype == torch.float32
    uniform = rand((1, DRAWS), seeded(0))
    assert float(uniform.min()) >= 0.0 and float(uniform.max()) < 1.0
    integers = randint(5, (1, DRAWS), seeded(0))
    assert integers.dtype == torch.int64
    assert integers.unique().tolist() == [0, 1, 2, 3, 4]
