"""Video solvers: their schedules and orders, and that a scheduler steps as it does in WanPipeline."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from univigu.flow.time import shift_sigma, time_from_sigma
from univigu.sampling.solvers import VideoSolver

SOLVERS = ("euler", "unipc", "dpm")


def flow_scheduler(kind: type = UniPCMultistepScheduler, shift: float = 3.0) -> Any:
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def solve(solver: VideoSolver, x: torch.Tensor | None = None) -> torch.Tensor:
    """Integrate dx/dt = (1 + t) x from ``times[0]``, predicting as Wan does.

    All derivatives of the solution are positive, so no errors cancel and an order shows cleanly.
    """
    x = torch.ones(1, 1) if x is None else x
    for i, t in enumerate(solver.times):
        x = solver.step(-(1 + t) * x, i, x)
    return x


def truth(start: float = 0.0) -> float:
    return math.exp(1.5 - start - start**2 / 2)


def errors(name: str, *counts: int, shift: float = 3.0) -> list[float]:
    return [abs(float(solve(VideoSolver(name, n, shift))) - truth()) for n in counts]


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_levels_are_evenly_spaced_and_shifted(steps: int, shift: float) -> None:
    grid = time_from_sigma(shift_sigma(torch.linspace(1, 0, steps + 1), shift)).tolist()
    euler = VideoSolver("euler", steps, shift)
    assert euler.times == pytest.approx(grid[:-1], abs=1e-6)
    assert [euler.ends[i] for i in range(steps)] == pytest.approx(grid[1:], abs=1e-6)
    for i, t in enumerate(euler.times):
        assert float(euler.timesteps[i]) == pytest.approx(1000 * (1 - t), abs=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_orders_under_step_halving(shift: float) -> None:
    euler = errors("euler", 64, 128, 256, shift=shift)
    heun = VideoSolver(FlowMatchHeunDiscreteScheduler(shift=shift), 256)
    assert all(0.85 < math.log2(coarse / fine) < 1.15 for coarse, fine in pairwise(euler))
    assert abs(float(solve(heun)) - truth()) < euler[2] / 10 and errors("unipc", 40)[0] < errors("euler", 40)[0] / 10


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_straight_paths_are_followed_exactly(steps: int) -> None:
    noise, data = torch.randn(2, 2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    run, x = VideoSolver("euler", steps), noise
    for i in range(len(run.times)):
        x = run.step(noise - data, i, x)
    torch.testing.assert_close(x, data, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "scheduler",
    [flow_scheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0), flow_scheduler(DPMSolverMultistepScheduler)],
    ids=lambda s: type(s).__name__,
)
def test_a_scheduler_steps_as_in_wan_pipeline(scheduler: Any) -> None:
    reference = type(scheduler).from_config(scheduler.config)
    reference.set_timesteps(8)
    solver = VideoSolver(scheduler, 8)
    theirs = ours = torch.linspace(-1, 1, 24).view(1, 2, 1, 3, 4)
    for i, t in enumerate(reference.timesteps):
        assert float(solver.timesteps[i]) == float(t)
        assert solver.times[i] == pytest.approx(1 - float(reference.sigmas[i]), abs=1e-6)
        theirs = reference.step(torch.sin(theirs) * t / 500, t, theirs, return_dict=False)[0]
        ours = solver.step(torch.sin(ours) * t / 500, i, ours)
    assert torch.equal(ours, theirs)
    assert solver.ends[7] == 1.0
    assert scheduler.step_index is None  # the one passed in is not changed


@pytest.mark.parametrize(("name", "kind"), [("unipc", UniPCMultistepScheduler), ("dpm", DPMSolverMultistepScheduler)])
def test_schedulers_by_name_are_wans(name: str, kind: type) -> None:
    """The same states as with the scheduler itself, at the given shift only."""
    ends = [solve(VideoSolver(*args)) for args in ((name, 6, 5.0), (flow_scheduler(kind, 5.0), 6), (name, 6, 3.0))]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("start", [0.0, 0.3, 0.999])
def test_start_takes_the_latest_level_that_is_noisy_enough(name: str, start: float) -> None:
    whole, tail = VideoSolver(name, 50), VideoSolver(name, 50, start=start)
    grid = sorted(set(whole.times))
    assert tail.times[0] == max([t for t in grid if t <= start], default=grid[0])
    assert set(tail.times) == {t for t in whole.times if t >= tail.times[0]}
    assert abs(float(tail.timesteps[0]) - 1000 * (1 - tail.times[0])) < 1.01  # UniPC's are whole numbers
    # A wrong entry into a multistep schedule would show in the end state.
    assert float(solve(tail)) == pytest.approx(truth(tail.times[0]), rel=0.08)
    for t in grid:  # a time of the schedule finds itself
        assert VideoSolver(name, 50, start=t).times[0] == t


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_bfloat16_predictions_do_not_reach_the_state(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 2, 2, 3, 3, generator=generator)
    prediction = torch.randn(noise.shape, generator=generator).bfloat16()
    solver, reference = VideoSolver(name, 4), VideoSolver(name, 4)
    x = expected = noise
    for i in range(len(solver.times)):
        x = solver.step(prediction, i, x)
        expected = reference.step(prediction.float(), i, expected)
        assert x.dtype == torch.float32
    assert torch.equal(x, expected)
    assert not torch.equal(x, x.bfloat16().float())
    assert VideoSolver(name, 4).step(prediction, 0, noise.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 2, 50, 177, 256, 999])
def test_whole_number_timesteps_are_recognised(steps: int) -> None:
    """UniPC cuts its timesteps; at 177, 256 and 999 steps float32 then sees one that is off by a whole 1."""
    assert len(VideoSolver("unipc", steps).times) == steps


def test_many_neighbouring_steps_stay_apart() -> None:
    solver = VideoSolver("euler", 1000)
    assert len({float(solver.timesteps[i]) for i in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("euler", 4, 0.0), "shift: must be a positive finite number, got 0.0"),
        (("unipc", 4, -1.0), "shift: must be a positive finite number, got -1.0"),
        ((DDIMScheduler(), 4), "DDIMScheduler: prediction_type is 'epsilon'"),
        ((UniPCMultistepScheduler(prediction_type="flow_prediction"), 4), "its timesteps are not 1000 sigma"),
        ((FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 4), "its noise levels do not end at 0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoSolver(*arguments)
