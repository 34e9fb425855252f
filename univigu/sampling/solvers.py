"""Solvers of the video's flow, from noise (t = 0) to latents (t = 1): diffusers' schedulers behind one interface."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from univigu.flow.time import NUM_TRAIN_TIMESTEPS, shift_sigma, time_from_sigma


class VideoSolver:
    """One sampling run of diffusers' "euler", "unipc" or "dpm" with ``shift``, or of a scheduler of diffusers.

    A scheduler is copied and steps as in ``WanPipeline``, with its own shift; a ValueError for one that is not a
    flow-matching one. ``num_steps`` leads from noise to data.

    ``timesteps`` has the model's timestep of every evaluation (1000 is noise, 0 is clean), of which Heun's method takes
    two a step; ``times`` its flow time, not falling, and ``ends`` that of the state after it. The first is the
    scheduler's latest one that is not later than ``start`` in [0, 1), which is over 0 to edit a video.
    """

    def __init__(self, solver: str | SchedulerMixin, num_steps: int, shift: float = 3.0, start: float = 0.0) -> None:
        scheduler: Any
        sigmas = shift_sigma(torch.linspace(1.0, 0.0, num_steps + 1), shift)  # a ValueError for a shift out of range
        if isinstance(solver, SchedulerMixin):
            scheduler = type(solver).from_config(solver.config)  # type: ignore[attr-defined]
            scheduler.set_timesteps(num_steps)
        elif solver == "euler":
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
            # Given only their number, it would shift its last level twice, which makes its last step almost empty.
            scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
        else:
            kind = {"unipc": diffusers.UniPCMultistepScheduler, "dpm": diffusers.DPMSolverMultistepScheduler}[solver]
            scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
            scheduler.set_timesteps(num_steps)
        _check_flow_matching(scheduler)
        times = time_from_sigma(scheduler.sigmas)
        # The tolerance lets a time read from the schedule find itself, through float32 and back.
        begin = max(int((times[:-1] <= start + 1e-6).sum()) - 1, 0)
        scheduler.set_begin_index(begin)
        self._scheduler, self.timesteps = scheduler, scheduler.timesteps[begin:]
        self.times: list[float] = times[begin:-1].tolist()
        self.ends: list[float] = times[begin + 1 :].tolist()

    def step(self, prediction: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        """The next state, float32, given Wan's prediction (noise - data) at x and ``times[i]``; i comes in order."""
        return self._scheduler.step(prediction.float(), self.timesteps[i], x.float(), return_dict=False)[0]


def _check_flow_matching(scheduler: Any) -> None:
    """Raise a ValueError unless a scheduler's noise levels and timesteps are those of flow matching."""
    name = type(scheduler).__name__
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        raise ValueError(f"{name}: prediction_type is {prediction!r}, Wan needs 'flow_prediction'")
    sigmas, timesteps = getattr(scheduler, "sigmas", None), scheduler.timesteps
    if sigmas is None or len(sigmas) != len(timesteps) + 1 or float(sigmas[-1]) != 0.0:
        raise ValueError(f"{name}: its noise levels do not end at 0 after the last step, as flow matching's do")
    # Some schedulers cut timesteps to whole numbers, by up to 1 and, through float32, a little more.
    if float((timesteps.float() - NUM_TRAIN_TIMESTEPS * sigmas[:-1]).abs().max()) > 1.01:
        raise ValueError(f"{name}: its timesteps are not 1000 sigma; set use_flow_sigmas=True if it has the option")
