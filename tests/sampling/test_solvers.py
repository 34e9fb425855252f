"""Video solvers: their schedules, their orders, and the diffusers schedulers behind the same interface."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from univigu.sampling.solvers import (
    DiffusersSolver,
    EulerSolver,
    HeunSolver,
    VideoSolver,
    euler_sigmas,
    euler_times,
    make_video_solver,
)


def unipc() -> Any:
    return UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


def ddim() -> Any:
    return DDIMScheduler()


def unipc_without_flow() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction")


def flow_euler(**options: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(**options)


def solve(solver: VideoSolver, x: torch.Tensor) -> torch.Tensor:
    """Integrate dx/dt = (1 + t) x from ``times[0]``, speaking to the solver as Wan does.

    All derivatives of the solution are positive, so no errors cancel and an order shows cleanly.
    """
    for i, t in enumerate(solver.times):
        x = solver.step(-(1 + t) * x, i, x)
    return x


def truth(start: float = 0.0) -> float:
    return math.exp(1.5 - start - start**2 / 2)


def errors(build, counts: tuple[int, ...]) -> list[float]:  # type: ignore[no-untyped-def]
    return [abs(float(solve(build(n), torch.ones(1, 1))) - truth()) for n in counts]


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_schedule_is_that_of_diffusers_given_even_levels(steps: int, shift: float) -> None:
    scheduler = flow_euler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    solver = EulerSolver(steps, shift)
    torch.testing.assert_close(euler_sigmas(steps, shift), scheduler.sigmas, rtol=1e-6, atol=1e-7)
    timesteps = torch.cat([solver.timestep(i, 1) for i in range(steps)])
    torch.testing.assert_close(timesteps, scheduler.timesteps, rtol=1e-6, atol=1e-4)
    times = euler_times(steps, shift)
    assert times[0] == 0.0 and times[-1] == 1.0 and times == sorted(set(times))
    assert solver.times == times[:-1]
    assert [solver.next_time(i) for i in range(steps)] == times[1:]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_orders_under_step_halving(shift: float) -> None:
    euler = errors(lambda n: EulerSolver(n, shift), (64, 128, 256))
    heun = errors(lambda n: HeunSolver(n, shift), (64, 128, 256))
    for coarse, fine in pairwise(euler):
        assert 0.85 < math.log2(coarse / fine) < 1.15
    for coarse, fine in pairwise(heun):
        assert 1.75 < math.log2(coarse / fine) < 2.25
    assert heun[2] < euler[2] / 10


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_straight_paths_are_followed_exactly(name: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noise, data = torch.randn(2, 2, 3, 4, 5, 6, generator=generator)
    x = noise
    solver = make_video_solver(name, steps)
    for i in range(len(solver.times)):
        x = solver.step(noise - data, i, x)
    torch.testing.assert_close(x, data, rtol=0, atol=2e-6)


def test_heun_evaluates_inner_levels_twice_and_never_at_the_end() -> None:
    grid = euler_times(3, 3.0)
    solver = HeunSolver(3, 3.0)
    assert solver.times == [grid[0], grid[1], grid[1], grid[2], grid[2]]
    assert [solver.next_time(i) for i in range(5)] == [grid[1], grid[1], grid[2], grid[2], 1.0]


def test_heun_matches_diffusers_on_its_levels() -> None:
    """Theirs on its own levels; ours takes them over, so the stepping alone is compared."""
    scheduler: Any = FlowMatchHeunDiscreteScheduler(shift=3.0)
    theirs, ours = DiffusersSolver(scheduler, 6), HeunSolver(6)
    ours.times, ours._ends = theirs.times, theirs._ends
    torch.testing.assert_close(solve(ours, torch.ones(1, 1)), solve(theirs, torch.ones(1, 1)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        unipc(),
        flow_euler(shift=3.0),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_wrapped_scheduler_does_what_wan_pipeline_does(scheduler) -> None:  # type: ignore[no-untyped-def]
    reference = type(scheduler).from_config(scheduler.config)
    reference.set_timesteps(8)
    solver = make_video_solver(scheduler, 8)
    theirs = ours = torch.linspace(-1, 1, 24).view(1, 2, 1, 3, 4)
    for i, t in enumerate(reference.timesteps):
        assert solver.timestep(i, 2).tolist() == [float(t)] * 2
        assert solver.times[i] == pytest.approx(1 - float(reference.sigmas[i]), abs=1e-6)
        theirs = reference.step(torch.sin(theirs) * t / 500, t, theirs, return_dict=False)[0]
        ours = solver.step(torch.sin(ours) * t / 500, i, ours)
    assert torch.equal(ours, theirs)
    assert solver.next_time(7) == 1.0
    assert scheduler.step_index is None  # the one passed in is untouched


def test_unipc_is_far_more_accurate_than_euler() -> None:
    assert errors(lambda n: DiffusersSolver(unipc(), n), (40,))[0] < errors(EulerSolver, (40,))[0] / 10


@pytest.mark.parametrize("build", [EulerSolver, HeunSolver, lambda n, start: DiffusersSolver(unipc(), n, start)])
@pytest.mark.parametrize("start", [0.0, 0.3, 0.999])
def test_start_takes_the_latest_level_that_is_noisy_enough(build, start: float) -> None:  # type: ignore[no-untyped-def]
    whole, tail = build(50, start=0.0), build(50, start=start)
    grid = sorted({*whole.times, 1.0})
    assert tail.times[0] == max([t for t in grid[:-1] if t <= start], default=grid[0])
    assert set(tail.times) == {t for t in whole.times if t >= tail.times[0]}
    assert tail.timestep(0, 1).dtype == torch.float32
    assert abs(float(tail.timestep(0, 1)) - 1000 * (1 - tail.times[0])) < 1.01  # UniPC's are whole numbers
    # A wrong entry into a multistep schedule would show in the end state.
    end = float(solve(tail, torch.ones(1, 1)))
    assert end == pytest.approx(truth(tail.times[0]), rel=0.08)


def test_start_at_a_time_of_the_schedule_finds_it() -> None:
    for t in euler_times(30, 3.0)[:-1]:
        assert EulerSolver(30, 3.0, start=t).times[0] == t


@pytest.mark.parametrize("build", [EulerSolver, HeunSolver, lambda n: DiffusersSolver(unipc(), n)])
def test_bfloat16_predictions_do_not_reach_the_state(build) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 2, 2, 3, 3, generator=generator)
    prediction = torch.randn(noise.shape, generator=generator).bfloat16()
    solver, reference = build(4), build(4)
    x = expected = noise
    for i in range(len(solver.times)):
        x = solver.step(prediction, i, x)
        expected = reference.step(prediction.float(), i, expected)
        assert x.dtype == torch.float32
    assert torch.equal(x, expected)
    assert not torch.equal(x, x.bfloat16().float())
    first = build(4)
    assert first.step(prediction, 0, noise.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 2, 50, 177, 256, 999])
def test_whole_number_timesteps_are_recognised(steps: int) -> None:
    """UniPC cuts its timesteps; at 177, 256 and 999 steps float32 then sees one that is off by a whole 1."""
    assert len(DiffusersSolver(unipc(), steps).times) == steps


def test_many_neighbouring_steps_stay_apart() -> None:
    solver = EulerSolver(1000, 3.0)
    assert len({float(solver.timestep(i, 1)) for i in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EulerSolver(0), "num_steps: must be at least 1, got 0"),
        (lambda: HeunSolver(-1), "num_steps: must be at least 1, got -1"),
        (lambda: DiffusersSolver(unipc(), 0), "num_steps: must be at least 1, got 0"),
        (lambda: EulerSolver(4, 0.0), "shift: must be a positive finite number, got 0.0"),
        (lambda: EulerSolver(4, 3.0, 1.0), r"start: must lie in \[0, 1\), got 1.0"),
        (lambda: DiffusersSolver(unipc(), 4, -0.1), r"start: must lie in \[0, 1\), got -0.1"),
        (lambda: make_video_solver("rk4", 4), "solver: must be 'euler', 'heun', 'unipc', 'dpm' or a diffusers"),
        (lambda: DiffusersSolver(ddim(), 4), "DDIMScheduler: prediction_type is 'epsilon'"),
        (
            lambda: DiffusersSolver(unipc_without_flow(), 4),
            "UniPCMultistepScheduler: its timesteps are not 1000 sigma",
        ),
        (
            lambda: DiffusersSolver(flow_euler(invert_sigmas=True), 4),
            "FlowMatchEulerDiscreteScheduler: its noise levels do not end at 0",
        ),
    ],
)
def test_arguments_out_of_range_are_named(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        build()


def test_steps_out_of_order_or_shape_are_refused() -> None:
    solver = EulerSolver(2)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="i: expected evaluation 0 of 2, got 1"):
        solver.step(x, 1, x)
    with pytest.raises(ValueError, match=r"prediction: shape \[1, 1\] differs from the state's \[1, 2\]"):
        solver.step(x[:, :1], 0, x)
    for i in range(2):
        x = solver.step(x, i, x)
    with pytest.raises(ValueError, match="expected evaluation 2 of 2, got 2; one solver, one run"):
        solver.step(x, 2, x)


@pytest.mark.parametrize(("name", "kind"), [("unipc", UniPCMultistepScheduler), ("dpm", DPMSolverMultistepScheduler)])
def test_schedulers_by_name_are_wans(name: str, kind: type) -> None:
    """The same states as with the scheduler itself, at the shift asked for and at no other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 1, 2, 2, generator=generator)
    targets = [torch.randn(1, 2, 1, 2, 2, generator=generator) for _ in range(6)]
    ends = []
    for solver, shift in ((name, 5.0), (flow_scheduler(kind, 5.0), 1.0), (name, 3.0)):
        run, state = make_video_solver(solver, 6, shift), x
        for i, target in enumerate(targets):
            state = run.step(target, i, state)
        ends.append(state)
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def flow_scheduler(kind: type, shift: float) -> Any:
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
