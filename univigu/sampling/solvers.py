"""Solvers of the video's flow: from noise (t = 0) to latents (t = 1), in float32.

A sampling loop sees one interface, whether the solver is ours or a diffusers scheduler::

    solver = make_video_solver("heun", num_steps=20, shift=3.0)
    for i, t in enumerate(solver.times):
        prediction = model(x, solver.timestep(i, batch, device), ...)
        x = solver.step(prediction, i, x)

One pass of the loop is one evaluation of the model; Heun takes two a step. A solver serves one run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from univigu.flow.time import NUM_TRAIN_TIMESTEPS, shift_sigma, time_from_sigma, timestep_from_sigma
from univigu.flow.video import velocity_from_prediction


def euler_sigmas(num_steps: int, shift: float) -> torch.Tensor:
    """Noise levels 1 -> 0 of a sampler: evenly spaced, then shifted; float32 [num_steps + 1].

    They are those of diffusers' ``FlowMatchEulerDiscreteScheduler(shift=s)`` when it is given the even levels
    (``set_timesteps(sigmas=linspace(1, 1/n, n))``), as its pipelines do. Given ``n`` alone it shifts its own last
    level twice, which costs it a step almost at sigma 0 (for n = 2, s = 3 it takes 1, 0.009, 0).

    Raises:
        ValueError: ``num_steps`` is below 1, or ``shift`` is not a positive finite number.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: must be at least 1, got {num_steps}")
    return shift_sigma(torch.linspace(1.0, 0.0, num_steps + 1), shift)


def euler_times(num_steps: int, shift: float) -> list[float]:
    """The flow times of :func:`euler_sigmas`: ``num_steps + 1`` of them, from exactly 0 to exactly 1."""
    return time_from_sigma(euler_sigmas(num_steps, shift)).tolist()


def euler_step(x: torch.Tensor, u: torch.Tensor, t: float, t_next: float) -> torch.Tensor:
    """``x + (t_next - t) u``: float32, the shape of x. Order 1."""
    return x.float() + (t_next - t) * u.float()


def heun_step(x: torch.Tensor, u: torch.Tensor, u_next: torch.Tensor, t: float, t_next: float) -> torch.Tensor:
    """``x + (t_next - t) (u + u_next) / 2``, where u_next is taken at the Euler step's result. Order 2."""
    return x.float() + (t_next - t) * 0.5 * (u.float() + u_next.float())


class VideoSolver(ABC):
    """Where the model is to be evaluated, and what its predictions do to the state.

    Attributes:
        times: flow time of every evaluation, not falling. The first is the flow time of the state to start from.
    """

    times: list[float]

    def __init__(self, sigmas: torch.Tensor, timesteps: torch.Tensor) -> None:
        """Take the noise level of every evaluation and of the end, [N + 1], and the model's timesteps [N]."""
        times = time_from_sigma(sigmas).tolist()
        self.times, self._ends = times[:-1], times[1:]
        self._timesteps: list[float] = timesteps.float().tolist()
        self._next = 0

    def timestep(self, i: int, batch: int, device: torch.device | str | None = None) -> torch.Tensor:
        """What the model is given as its time at evaluation i: float32 [B], 1000 is noise and 0 is clean."""
        return torch.full((batch,), self._timesteps[i], dtype=torch.float32, device=device)

    def next_time(self, i: int) -> float:
        """Flow time of the state that ``step(..., i, ...)`` returns."""
        return self._ends[i]

    def step(self, prediction: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        """Advance the state.

        Args:
            prediction: Wan's prediction (noise - data) at ``x`` and ``times[i]``, [B, C, T, H, W].
            i: number of the evaluation; they must come in order.
            x: the state, the shape of ``prediction``.

        Returns:
            The next state, float32 whatever the prediction's type.

        Raises:
            ValueError: evaluations out of order, or two shapes.
        """
        if i != self._next or i >= len(self.times):
            raise ValueError(f"i: expected evaluation {self._next} of {len(self.times)}, got {i}; one solver, one run")
        if prediction.shape != x.shape:
            raise ValueError(f"prediction: shape {list(prediction.shape)} differs from the state's {list(x.shape)}")
        self._next += 1
        return self._step(prediction.float(), i, x.float())

    @abstractmethod
    def _step(self, prediction: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        """As ``step``, on checked float32 tensors."""


class EulerSolver(VideoSolver):
    """Euler steps on shifted, evenly spaced noise levels.

    Args:
        num_steps: steps of the whole schedule, at least 1.
        shift: the timestep shift, above 0.
        start: flow time in [0, 1) to start at, to re-noise a clean video instead of starting from noise. The
            schedule's latest level that is at least as noisy is taken: see ``times[0]``.
    """

    def __init__(self, num_steps: int, shift: float = 3.0, start: float = 0.0) -> None:
        sigmas = _from_start(euler_sigmas(num_steps, shift), start)
        super().__init__(sigmas, timestep_from_sigma(sigmas[:-1]))

    def _step(self, prediction: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        return euler_step(x, velocity_from_prediction(prediction), self.times[i], self.next_time(i))


class HeunSolver(VideoSolver):
    """Heun's method on the same noise levels; arguments as :class:`EulerSolver`.

    A step evaluates the model at its start and at the Euler step's end, so ``times`` holds inner levels twice. The
    last step is Euler's (as in Karras et al., 2022, arXiv:2206.00364, Algorithm 1): a model need not have learned
    to predict at t = 1, where a video is a clean condition. The method keeps its order 2.
    """

    def __init__(self, num_steps: int, shift: float = 3.0, start: float = 0.0) -> None:
        levels = _from_start(euler_sigmas(num_steps, shift), start)
        inner = levels[1:-1].repeat_interleave(2)
        sigmas = torch.cat((levels[:1], inner, levels[-1:]))
        super().__init__(sigmas, timestep_from_sigma(sigmas[:-1]))
        self._begun: tuple[torch.Tensor, torch.Tensor] | None = None  # a half-done step's state and velocity

    def _step(self, prediction: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        u = velocity_from_prediction(prediction)
        if self._begun is None:
            self._begun = x, u
            return euler_step(x, u, self.times[i], self.next_time(i))
        begin, u_begin = self._begun
        self._begun = None
        return heun_step(begin, u_begin, u, self.times[i - 1], self.times[i])


class DiffusersSolver(VideoSolver):
    """Any flow-matching scheduler of diffusers, stepping as it does in ``WanPipeline``.

    Args:
        scheduler: its configuration is copied, so the original keeps its state. Its own shift applies.
        num_steps: steps of the whole schedule, at least 1.
        start: as for :class:`EulerSolver`.

    Raises:
        ValueError: the scheduler is no flow-matching one that predicts ``noise - data``.
    """

    def __init__(self, scheduler: SchedulerMixin, num_steps: int, start: float = 0.0) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps: must be at least 1, got {num_steps}")
        self._scheduler: Any = type(scheduler).from_config(scheduler.config)  # type: ignore[attr-defined]
        self._scheduler.set_timesteps(num_steps)
        sigmas, timesteps = _flow_schedule(self._scheduler)
        kept = _from_start(sigmas, start)
        begin = len(sigmas) - len(kept)
        self._scheduler.set_begin_index(begin)
        self._scheduler_timesteps: Sequence[Any] = self._scheduler.timesteps[begin:]
        super().__init__(kept, timesteps[begin:])

    def _step(self, prediction: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        return self._scheduler.step(prediction, self._scheduler_timesteps[i], x, return_dict=False)[0]


def make_video_solver(
    solver: str | SchedulerMixin, num_steps: int, shift: float = 3.0, start: float = 0.0
) -> VideoSolver:
    """A solver from "euler", "heun", "unipc", "dpm" or a diffusers scheduler.

    Args:
        solver: "unipc" and "dpm" are diffusers' ``UniPCMultistepScheduler`` and ``DPMSolverMultistepScheduler``, of
            order 2, as for Wan; a scheduler brings its own shift.
        num_steps, shift, start: as for :class:`EulerSolver`.

    Raises:
        ValueError: no such solver, or an argument out of range.
    """
    multistep = {"unipc": UniPCMultistepScheduler, "dpm": DPMSolverMultistepScheduler}
    if isinstance(solver, str) and solver in multistep:
        solver = multistep[solver](prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if isinstance(solver, SchedulerMixin):
        return DiffusersSolver(solver, num_steps, start)
    if solver == "euler":
        return EulerSolver(num_steps, shift, start)
    if solver == "heun":
        return HeunSolver(num_steps, shift, start)
    raise ValueError(f"solver: must be 'euler', 'heun', 'unipc', 'dpm' or a diffusers scheduler, got {solver!r}")


def _from_start(sigmas: torch.Tensor, start: float) -> torch.Tensor:
    """The falling levels from the last evaluated one that is no cleaner than ``start`` (or the first of all)."""
    if not 0.0 <= start < 1.0:
        raise ValueError(f"start: must lie in [0, 1), got {start}")
    # Times that were read from a schedule must find themselves, through float32 and back.
    early = int((time_from_sigma(sigmas[:-1]) <= start + 1e-6).sum())
    return sigmas[max(early - 1, 0) :]


def _flow_schedule(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A scheduler's noise levels [N + 1] and timesteps [N], if they are those of flow matching."""
    name = type(scheduler).__name__
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        raise ValueError(f"{name}: prediction_type is {prediction!r}, Wan needs 'flow_prediction'")
    sigmas = getattr(scheduler, "sigmas", None)
    timesteps = scheduler.timesteps
    if sigmas is None or len(sigmas) != len(timesteps) + 1 or float(sigmas[-1]) != 0.0:
        raise ValueError(f"{name}: its noise levels do not end at 0 after the last step, as flow matching's do")
    # Some schedulers cut timesteps to whole numbers, by up to 1 and, through float32, a little more.
    if float((timesteps.float() - NUM_TRAIN_TIMESTEPS * sigmas[:-1]).abs().max()) > 1.01:
        raise ValueError(f"{name}: its timesteps are not 1000 sigma; set use_flow_sigmas=True if it has the option")
    return sigmas.float(), timesteps.float()
