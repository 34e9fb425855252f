"""Generate, edit, caption, joint: one sampler whose two modalities start at different times.

generate   video from noise, no text stream            guided by the prompt
edit       video from part of the way to noise         guided by another prompt
caption    video clean,      text from noise           the condition may be a question
joint      video from noise, text from noise           in parallel

A single image is a video of one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from univigu.flow.inputs import TextInputs
from univigu.flow.random import Generators, randn
from univigu.flow.text import TextFlow
from univigu.flow.time import NUM_TRAIN_TIMESTEPS
from univigu.flow.video import interpolate
from univigu.models.cache import AttentionCache
from univigu.sampling.options import SamplingOptions
from univigu.sampling.solvers import VideoSolver, make_video_solver

__all__ = ["Sampler", "Samples", "SamplingOptions", "StepCallback", "StepState", "uniform_times"]


@dataclass
class StepState:
    """Where sampling stands after a step."""

    step: int
    """Counted from 0."""
    num_steps: int
    latents: torch.Tensor
    """The video [B, C, T, H, W]; the given one for ``caption``."""
    video_time: float
    """Its flow time: 0 noise, 1 data."""
    text: torch.Tensor | None
    """The text's state [B, L] or [B, L, D]; None for tasks without text."""
    text_time: float | None
    last: bool
    """Whether this is the last step: of the schedule, or that at which every text of the batch has ended."""


StepCallback = Callable[[StepState], None]


@dataclass
class Samples:
    """What a task made."""

    latents: torch.Tensor | None
    """Video latents [B, C, T, H, W], normalised; the given ones for ``caption``."""
    tokens: torch.Tensor | None
    """Text tokens [B, L]; None for ``generate`` and ``edit``."""


@dataclass
class VideoContext:
    """A video that stays as it is while text is denoised beside it."""

    latents: torch.Tensor
    """[B, C, T, H, W], in the model's type."""
    timestep: torch.Tensor
    """[B]."""
    prompt_embeds: torch.Tensor
    """[B, S, text_dim], in the model's type."""
    refresh: int | None
    """Every how many steps it is computed anew; None: once, because it does not depend on the text."""

    def __post_init__(self) -> None:
        self.cache = AttentionCache(keep_video=self.refresh != 1)

    def text_output(self, model: Any, step: int, text: torch.Tensor, text_timestep: torch.Tensor) -> torch.Tensor:
        """The model's text output [B, L, ...] at a step; the video is computed along with it only when it is due."""
        inputs = {"text": TextInputs(text, text_timestep), "cache": self.cache}
        due = step == 0 if self.refresh is None else step % self.refresh == 0
        if due:
            return model(self.latents, self.timestep, self.prompt_embeds, **inputs).text
        return model(None, None, None, **inputs).text


class Sampler:
    """Draws samples from a unified model.

    Args:
        model: a UniViGUTransformer3DModel in evaluation mode.
        text_flow: the flow the model's text stream was trained with.
        scheduler: a diffusers scheduler for the video, its class and config taken as the template.
        options: see :class:`SamplingOptions`.
        eos_token_id, pad_token_id: of the tokenizer.  With both, a caption of the ``mask`` flow is done, and sampling
            stops, once its end and all before it stand; what is behind the end is then padding.
    """

    def __init__(
        self,
        model: Any,
        text_flow: TextFlow,
        scheduler: Any,
        options: SamplingOptions | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        self.model = model
        self.text_flow = text_flow
        self.scheduler = scheduler
        self.shift = float(scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0)))
        self.options = options or SamplingOptions()
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id

    # ---------------------------------------------------------------------- tasks

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
            on_step: called after each step with a :class:`StepState`.
        """
        video = self._noise(prompt_embeds, latents_shape, generator) if latents is None else latents.float()
        solver = self._solver(self.options.num_inference_steps)
        video, _ = self._denoise_video(video, solver, prompt_embeds, null_embeds, on_step=on_step)
        return Samples(video, None)

    def edit(
        self,
        latents: torch.Tensor,
        strength: float,
        prompt_embeds: torch.Tensor,
        null_embeds: torch.Tensor,
        generator: Generators = None,
        on_step: StepCallback | None = None,
    ) -> Samples:
        """A video made anew under another prompt, from a mixture of itself and noise.

        Args:
            latents: the clean video, normalised [B, C, T, H, W].
            strength: how far back towards noise it starts, in (0, 1]: flow time 1 - strength; 1 keeps nothing.  The
                sampler's last level that is at least as noisy is taken.
            prompt_embeds, null_embeds, generator, on_step: as in :meth:`generate`.

        Raises:
            ValueError: strength out of range.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength!r}: expected over 0, at most 1")
        solver = self._solver(self.options.num_inference_steps, start=1.0 - strength)
        noise = self._noise(latents, latents.shape[1:], generator)
        begin = latents.new_full((latents.shape[0],), solver.times[0], dtype=torch.float32)
        video = interpolate(noise, latents.float(), begin)
        video, _ = self._denoise_video(video, solver, prompt_embeds, null_embeds, on_step=on_step)
        return Samples(video, None)

    def caption(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        text_length: int,
        generator: Generators = None,
        on_step: StepCallback | None = None,
        null_embeds: torch.Tensor | None = None,
    ) -> Samples:
        """Text from noise beside clean video latents [B, C, T, H, W].

        Args:
            latents: the clean video, normalised [B, C, T, H, W].
            prompt_embeds: the condition [B or 1, S, text_dim]: the encoded empty prompt, a brief prompt, or a
                question, whose answer the text then is.
            text_length: slot of the text in tokens.
            generator, on_step: as in :meth:`generate`.
            null_embeds: the encoded empty prompt, if guidance contrasts with it.

        Raises:
            ValueError: guidance against the null condition without ``null_embeds``.
        """
        times = uniform_times(self.options.caption_steps)
        text = self._initial_text(latents, text_length, generator)
        contexts = self._caption_contexts(latents, prompt_embeds, null_embeds, generator)
        text = self._denoise_text(contexts, text, times, generator, on_step)
        return Samples(latents, self._tokens(text))

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
        solver, lag = self._solver(self.options.num_inference_steps), self.options.joint_lag
        both = len(solver.times)
        times = uniform_times(both + lag)
        video, text = self._denoise_video(video, solver, prompt_embeds, null_embeds, text, times, generator, on_step)
        if lag:
            contexts = self._caption_contexts(video, prompt_embeds, null_embeds, generator)
            text = self._denoise_text(contexts, text, times[both:], generator, on_step, done=both)
        return Samples(video, self._tokens(text))

    # ---------------------------------------------------------------------- video, with text or without

    @torch.no_grad()
    def _denoise_video(
        self,
        video: torch.Tensor,
        solver: VideoSolver,
        prompt_embeds: torch.Tensor,
        null_embeds: torch.Tensor,
        text: torch.Tensor | None = None,
        text_times: Sequence[float] = (),
        generator: Generators = None,
        on_step: StepCallback | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """The loop over the solver's evaluations; ``text`` None leaves the text stream out.

        ``text_times`` are at least as many as the solver's and one; those past its end are left to others.
        """
        batch, num_steps = video.shape[0], max(len(solver.times), len(text_times) - 1)
        embeds, null = self._cast(prompt_embeds), self._cast(null_embeds.expand(batch, -1, -1))
        both = torch.cat([embeds, null]) if self.options.batch_guidance and text is None else None
        caches = {id(e): AttentionCache(keep_video=False) for e in (embeds, null, both) if e is not None}
        low, high = self.options.guidance_interval

        def predict(inputs: torch.Tensor, condition: torch.Tensor, **text_inputs: Any) -> Any:
            timestep = solver.timestep(i, inputs.shape[0], inputs.device)
            return self.model(inputs, timestep, condition, cache=caches[id(condition)], **text_inputs)

        for i, time in enumerate(solver.times):
            # 1. One pass with everything, one with nothing but the video
            guided, inputs, output = self.options.guidance_scale > 1 and low <= time <= high, self._cast(video), None
            if guided and both is not None:
                prediction, unconditional = predict(torch.cat([inputs, inputs]), both).sample.chunk(2)
            else:
                text_inputs: dict[str, Any] = {}
                if text is not None:
                    text_inputs = {"text": TextInputs(text, _timestep(text_times[i], video))}
                output = predict(inputs, embeds, **text_inputs)
                prediction = output.sample
                unconditional = predict(inputs, null).sample if guided else prediction
            if guided:
                prediction = unconditional + self.options.guidance_scale * (prediction - unconditional)

            # 2. Both modalities move to their next times
            video = solver.step(prediction, i, video)
            if text is not None and output is not None:
                text = self._text_step(text, output.text, text_times, i, generator)
            if on_step is not None:
                text_time, last = None if text is None else text_times[i + 1], i + 1 == num_steps
                on_step(StepState(i, num_steps, video, solver.next_time(i), text, text_time, last))
        return video, text

    # ---------------------------------------------------------------------- text beside a video that stays

    def _caption_contexts(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        null_embeds: torch.Tensor | None,
        generator: Generators,
    ) -> list[VideoContext]:
        """The clean video under its condition; for guidance also what it is contrasted with.

        The noise of ``caption_guidance`` "video" is drawn once, but it is no clean video: it reads text in every model,
        so that keeping it is an approximation in every model, and :attr:`SamplingOptions.caption_refresh` decides.
        """
        batch, options = latents.shape[0], self.options
        embeds = self._cast(prompt_embeds.expand(batch, -1, -1))
        refresh = options.caption_refresh if self.model.config.clean_video_reads_text else None
        contexts = [VideoContext(self._cast(latents), _timestep(1.0, latents), embeds, refresh)]
        if options.caption_guidance_scale == 1:
            return contexts
        if options.caption_guidance == "video":  # pure noise says nothing
            noise = self._cast(self._noise(latents, latents.shape[1:], generator))
            contexts.append(VideoContext(noise, _timestep(0.0, latents), embeds, options.caption_refresh))
        elif null_embeds is None:
            raise ValueError("null_embeds=None: sampling.caption_guidance='prompt' needs the encoded empty prompt")
        else:
            null = self._cast(null_embeds.expand(batch, -1, -1))
            contexts.append(VideoContext(contexts[0].latents, contexts[0].timestep, null, refresh))
        return contexts

    @torch.no_grad()
    def _denoise_text(
        self,
        contexts: list[VideoContext],
        text: torch.Tensor,
        times: Sequence[float],
        generator: Generators,
        on_step: StepCallback | None,
        done: int = 0,
    ) -> torch.Tensor:
        """The loop over the text's times, until they end or every text of the batch does, after ``done`` steps."""
        scale, num_steps, video = self.options.caption_guidance_scale, done + len(times) - 1, contexts[0].latents
        for i in range(len(times) - 1):
            timestep = _timestep(times[i], text)
            output, *contrast = [context.text_output(self.model, i, text, timestep) for context in contexts]
            if contrast:
                output = contrast[0] + scale * (output - contrast[0])
            text = self._text_step(text, output, times, i, generator)
            last = done + i + 1 == num_steps
            if self.eos_token_id is not None and self.pad_token_id is not None:
                text, ended = self.text_flow.close(text, self.eos_token_id, self.pad_token_id)
                last = last or ended
            if on_step is not None:  # it sees the text closed, as the caller will
                on_step(StepState(done + i, num_steps, video, 1.0, text, times[i + 1], last))
            if last:
                break
        return text

    # ---------------------------------------------------------------------- parts

    def _text_step(
        self, text: torch.Tensor, output: torch.Tensor, times: Sequence[float], i: int, generator: Generators
    ) -> torch.Tensor:
        return self.text_flow.step(text, output, times[i], times[i + 1], self._table(), generator)

    def _solver(self, num_steps: int, start: float = 0.0) -> VideoSolver:
        solver = self.scheduler if self.options.solver == "scheduler" else self.options.solver
        return make_video_solver(solver, num_steps, self.shift, start)

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


def _timestep(time: float, like: torch.Tensor) -> torch.Tensor:
    """Wan's timestep of a flow time, float32 [B]."""
    value = NUM_TRAIN_TIMESTEPS * (1.0 - time)
    return torch.full((like.shape[0],), value, dtype=torch.float32, device=like.device)


def uniform_times(num_steps: int) -> list[float]:
    """Flow times 0, 1/n, ..., 1."""
    return [i / num_steps for i in range(num_steps + 1)]
