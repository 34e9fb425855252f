"""Generate, caption, joint: one denoising loop whose two modalities start at different times.

generate   video from noise, no text stream            guided by the prompt
caption    video clean,      text from noise
joint      video from noise, text from noise           in parallel
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from univigu.flow.random import Generators, randn
from univigu.flow.text import TextFlow
from univigu.sampling.solvers import VideoSolver, make_video_solver

StepCallback = Callable[[int, torch.Tensor | None, torch.Tensor | None], None]


@dataclass
class SamplingOptions:
    """How samples are drawn."""

    num_inference_steps: int = 20
    """Denoising steps of the video (and of both modalities in ``joint``)."""
    guidance_scale: float = 3.0
    """Classifier-free guidance on the video; 1 or less switches it off."""
    solver: Literal["scheduler", "euler"] = "scheduler"
    """"scheduler": the one of the foundation's folder; "euler": plain Euler steps with that scheduler's shift."""
    caption_steps: int = 50
    """Denoising steps of the text when the video is clean."""
    temperature: float = 0.0
    """Temperature of a discrete text flow's posterior; 0 takes its mode.  It is the flow's option: whoever builds
    the flow passes it on."""

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "caption_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling.{name}={getattr(self, name)!r}: expected at least 1")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature={self.temperature!r}: expected at least 0")
        if self.solver not in ("scheduler", "euler"):
            raise ValueError(f"sampling.solver={self.solver!r}: expected 'scheduler' or 'euler'")


@dataclass
class Samples:
    """What a task made."""

    latents: torch.Tensor | None
    """Video latents [B, C, T, H, W], normalised; the given ones for ``caption``."""
    tokens: torch.Tensor | None
    """Text tokens [B, L]; None for ``generate``."""


class Sampler:
    """Draws samples from a unified model.

    Args:
        model: a UniViGUTransformer3DModel in evaluation mode.
        text_flow: the flow the model's text stream was trained with.
        scheduler: a diffusers scheduler for the video, its class and config taken as the template.
        options: see :class:`SamplingOptions`.
    """

    def __init__(self, model: Any, text_flow: TextFlow, scheduler: Any, options: SamplingOptions | None = None) -> None:
        self.model = model
        self.text_flow = text_flow
        self.scheduler = scheduler
        self.shift = float(scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0)))
        self.options = options or SamplingOptions()

    def generate(
        self,
        prompt_embeds: torch.Tensor,
        null_embeds: torch.Tensor,
        latents_shape: Sequence[int],
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        on_step: StepCallback | None = None,
    ) -> Samples:
        """Video from noise under a prompt.

        Args:
            prompt_embeds: encoded prompts [B, S, text_dim].
            null_embeds: the encoded empty prompt [1, S, text_dim].
            latents_shape: (C, T, H, W) of a sample.
            generator: one generator, or one a sample (then a sample does not depend on its batch).
            latents: initial noise [B, C, T, H, W] to use instead of drawing it.
            on_step: called after each step with (step, latents, text state).
        """
        video = self._noise(prompt_embeds, latents_shape, generator) if latents is None else latents.float()
        solver = self._solver(self.options.num_inference_steps)
        video, _ = self._denoise(video, solver, None, None, prompt_embeds, null_embeds, generator, on_step)
        return Samples(video, None)

    def caption(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        text_length: int,
        generator: Generators = None,
        on_step: StepCallback | None = None,
    ) -> Samples:
        """Text from noise beside clean video latents [B, C, T, H, W].

        ``prompt_embeds`` [B or 1, S, text_dim] is the condition: the encoded empty prompt, a brief prompt, or
        a question.
        """
        times = uniform_times(self.options.caption_steps)
        text = self._initial_text(latents, text_length, generator)
        embeds = prompt_embeds.expand(latents.shape[0], -1, -1)
        _, tokens = self._denoise(latents.float(), None, text, times, embeds, None, generator, on_step)
        return Samples(latents, self._tokens(tokens))

    def joint(
        self,
        prompt_embeds: torch.Tensor,
        null_embeds: torch.Tensor,
        latents_shape: Sequence[int],
        text_length: int,
        generator: Generators = None,
        on_step: StepCallback | None = None,
    ) -> Samples:
        """Video and text from noise, in parallel, each reading the other; arguments as in ``generate``."""
        video = self._noise(prompt_embeds, latents_shape, generator)
        text = self._initial_text(video, text_length, generator)
        solver = self._solver(self.options.num_inference_steps)
        times = uniform_times(self.options.num_inference_steps)
        video, tokens = self._denoise(video, solver, text, times, prompt_embeds, null_embeds, generator, on_step)
        return Samples(video, self._tokens(tokens))

    @torch.no_grad()
    def _denoise(
        self,
        video: torch.Tensor,
        solver: VideoSolver | None,
        text: torch.Tensor | None,
        text_times: list[float] | None,
        prompt_embeds: torch.Tensor,
        null_embeds: torch.Tensor | None,
        generator: Generators,
        on_step: StepCallback | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loop. ``solver`` None leaves the video as it is (clean); ``text`` None leaves the text stream out."""
        batch, guided = video.shape[0], solver is not None and self.options.guidance_scale > 1
        num_steps = len(solver.times) if solver is not None else len(text_times or []) - 1
        for i in range(num_steps):
            # 1. Each modality's own time
            timestep = video.new_zeros(batch) if solver is None else solver.timestep(i, batch, video.device)
            inputs: dict[str, Any] = {}
            if text is not None and text_times is not None:
                text_timestep = video.new_full((batch,), 1000.0 * (1.0 - text_times[i]))
                inputs = {"text_tokens": text, "text_timestep": text_timestep}

            # 2. One pass with everything, one with nothing but the video
            output = self.model(self._cast(video), timestep, self._cast(prompt_embeds), **inputs)
            prediction = output.sample
            if guided and null_embeds is not None:
                null = self._cast(null_embeds.expand(batch, -1, -1))
                unconditional = self.model(self._cast(video), timestep, null).sample
                prediction = unconditional + self.options.guidance_scale * (prediction - unconditional)

            # 3. Both modalities move to their next times
            if solver is not None:
                video = solver.step(prediction, i, video)
            if text is not None and text_times is not None:
                table = self._table()
                text = self.text_flow.step(text, output.text, text_times[i], text_times[i + 1], table, generator)
            if on_step is not None:
                on_step(i, video, text)
        return video, text

    def _solver(self, num_steps: int) -> VideoSolver:
        solver = self.scheduler if self.options.solver == "scheduler" else self.options.solver
        return make_video_solver(solver, num_steps, self.shift)

    def _noise(self, like: torch.Tensor, shape: Sequence[int], generator: Generators) -> torch.Tensor:
        return randn((like.shape[0], *shape), generator, like.device)

    def _initial_text(self, like: torch.Tensor, length: int, generator: Generators) -> torch.Tensor:
        return self.text_flow.initial(like.shape[0], length, self._table(), generator, like.device)

    def _tokens(self, text: torch.Tensor | None) -> torch.Tensor | None:
        return None if text is None else self.text_flow.tokens(text, self._table())

    def _table(self) -> torch.Tensor | None:
        return self.model.token_table() if self.text_flow.needs_table else None

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        # The state stays float32 between steps; only the model sees its own dtype.
        return tensor.to(self.model.dtype)


def uniform_times(num_steps: int) -> list[float]:
    """Flow times 0, 1/n, ..., 1."""
    return [i / num_steps for i in range(num_steps + 1)]
