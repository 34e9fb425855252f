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
from univigu.flow.text import EmbeddingFlow, TextFlow
from univigu.flow.time import NUM_TRAIN_TIMESTEPS
from univigu.flow.video import interpolate
from univigu.models.cache import AttentionCache
from univigu.sampling.options import SamplingOptions
from univigu.sampling.solvers import VideoSolver, make_video_solver


@dataclass
class StepState:
    """State of sampling after a step."""

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
    """Whether this is the last step: of the schedule, or the one at which every text of the batch has ended."""


StepCallback = Callable[[StepState], None]


@dataclass
class Samples:
    """Results of a task."""

    latents: torch.Tensor
    """Video latents [B, C, T, H, W], normalised; the given ones for ``caption``."""
    tokens: torch.Tensor | None
    """Text tokens [B, L]; None for ``generate`` and ``edit``."""


@dataclass
class VideoContext:
    """A video that does not change while text is denoised."""

    latents: torch.Tensor
    """[B, C, T, H, W], in the model's type."""
    timestep: torch.Tensor
    """[B]."""
    prompt_embeds: torch.Tensor
    """[B, S, text_dim], in the model's type."""
    refresh: int | None
    """Recompute it every so many steps; None: compute it once, because it does not depend on the text."""

    def __post_init__(self) -> None:
        self.cache = AttentionCache(keep_video=self.refresh != 1)

    def logits(self, model: Any, step: int, text: TextInputs) -> torch.Tensor:
        """The model's logits [B, L, V] at a step; the video is computed along with them only when it is due."""
        due = step == 0 if self.refresh is None else step % self.refresh == 0
        video = (self.latents, self.timestep, self.prompt_embeds) if due else (None, None, None)
        return model(*video, text=text, cache=self.cache).text


@dataclass
class TextRun:
    """The text of one sampling run."""

    flow: TextFlow
    state: torch.Tensor
    """[B, L], or [B, L, D] for the embedding flow."""
    times: Sequence[float]
    """Flow times from 0 to 1, one more than there are steps."""
    generator: Generators

    endpoint: torch.Tensor | None = None
    """The last step's prediction of the data, for a flow with self-conditioning."""

    def inputs(self, i: int) -> TextInputs:
        """The transformer's inputs at step i."""
        return TextInputs(self.state, _timestep(self.times[i], self.state), endpoint=self.endpoint)

    def advance(self, i: int, logits: torch.Tensor) -> None:
        """Take step i, given the logits of its inputs."""
        t, t_next = self.times[i], self.times[i + 1]
        if isinstance(self.flow, EmbeddingFlow) and self.flow.self_conditioning:
            self.endpoint = self.flow.endpoint(logits)
        self.state = self.flow.step(self.state, logits, t, t_next, self.generator)

    def tokens(self) -> torch.Tensor:
        """The finished text, int64 [B, L]."""
        return self.flow.tokens(self.state)


class Sampler:
    """Draws samples from a unified model.

    Args:
        model: a UniViGUTransformer3DModel in evaluation mode.
        scheduler: a diffusers scheduler for the video; its class and config are used as a template.
        options: see :class:`SamplingOptions`.
        eos_token_id, pad_token_id: of the tokenizer. With both, sampling with the ``mask`` flow stops once the end of
            every text and everything before it is revealed; what follows the end is padding.
    """

    def __init__(
        self,
        model: Any,
        scheduler: Any,
        options: SamplingOptions | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        self.model = model
        self.scheduler = scheduler
        self.shift = float(scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0)))
        self.options = options or SamplingOptions()
        self.text_flow = self.options.make_text_flow(model.config)
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
        """Video from noise, given a prompt.

        Args:
            prompt_embeds: encoded prompts [B, S, text_dim].
            null_embeds: the encoded empty prompt [1, S, text_dim].
            latents_shape: (C, T, H, W) of a sample.
            generator: one generator, or one a sample (then a sample does not depend on its batch).
            latents: initial noise [B, C, T, H, W] to use instead of drawing it.
            on_step: called after each step with a :class:`StepState`.
        """
        video = self._noise(prompt_embeds, latents_shape, generator) if latents is None else latents.float()
        video = self._denoise_video(video, self._solver(), prompt_embeds, null_embeds, None, on_step)
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
        """A video regenerated under another prompt, from a mixture of itself and noise.

        Args:
            latents: the clean video, normalised [B, C, T, H, W].
            strength: flow time 1 - strength to start at, in (0, 1]; 1 keeps nothing of the video. The sampler's last
                level that is at least as noisy is taken.
            prompt_embeds, null_embeds, generator, on_step: as in :meth:`generate`.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength!r}: expected over 0, at most 1")
        solver = self._solver(start=1.0 - strength)
        noise = self._noise(latents, latents.shape[1:], generator)
        begin = latents.new_full((latents.shape[0],), solver.times[0], dtype=torch.float32)
        video = interpolate(noise, latents.float(), begin)
        video = self._denoise_video(video, solver, prompt_embeds, null_embeds, None, on_step)
        return Samples(video, None)

    @torch.no_grad()
    def caption(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        text_length: int,
        generator: Generators = None,
        on_step: StepCallback | None = None,
        null_embeds: torch.Tensor | None = None,
    ) -> Samples:
        """Text from noise, given clean video latents.

        Args:
            latents: the clean video, normalised [B, C, T, H, W].
            prompt_embeds: the condition [B or 1, S, text_dim]: the encoded empty prompt, a brief prompt, or a
                question, whose answer the text then is.
            text_length: number of text tokens.
            generator, on_step: as in :meth:`generate`.
            null_embeds: the encoded empty prompt; needed for ``caption_guidance`` "prompt".
        """
        text = self._start_text(latents, text_length, self.options.caption_steps, generator)
        self._denoise_text(text, 0, self._caption_contexts(latents, prompt_embeds, null_embeds, generator), on_step)
        return Samples(latents, text.tokens())

    @torch.no_grad()
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
        video, solver, lag = (
            self._noise(prompt_embeds, latents_shape, generator),
            self._solver(),
            self.options.joint_lag,
        )
        both = len(solver.times)
        text = self._start_text(video, text_length, both + lag, generator)
        video = self._denoise_video(video, solver, prompt_embeds, null_embeds, text, on_step)
        if lag:
            contexts = self._caption_contexts(video, prompt_embeds, null_embeds, generator)
            self._denoise_text(text, both, contexts, on_step)
        return Samples(video, text.tokens())

    # ---------------------------------------------------------------------- video, with text or without

    @torch.no_grad()
    def _denoise_video(
        self,
        video: torch.Tensor,
        solver: VideoSolver,
        prompt_embeds: torch.Tensor,
        null_embeds: torch.Tensor,
        text: TextRun | None,
        on_step: StepCallback | None,
    ) -> torch.Tensor:
        """The loop over the solver's evaluations; the text, if there is any, advances along."""
        batch, num_steps = video.shape[0], len(solver.times) if text is None else len(text.times) - 1
        scale, (low, high) = self.options.guidance_scale, self.options.guidance_interval
        embeds, null = self._cast(prompt_embeds), self._cast(null_embeds.expand(batch, -1, -1))
        both = torch.cat([embeds, null]) if self.options.batch_guidance and text is None else None
        caches = {id(e): AttentionCache(keep_video=False) for e in (embeds, null, both) if e is not None}

        def predict(inputs: torch.Tensor, condition: torch.Tensor, shown: TextInputs | None = None) -> Any:
            timestep = solver.timestep(i, inputs.shape[0], inputs.device)
            return self.model(inputs, timestep, condition, text=shown, cache=caches[id(condition)])

        for i, time in enumerate(solver.times):
            # 1. A pass with prompt and text, and for guidance one with neither
            guided, inputs, logits = scale > 1 and low <= time <= high, self._cast(video), None
            if guided and both is not None:
                prediction, unconditional = predict(torch.cat([inputs, inputs]), both).sample.chunk(2)
            else:
                output = predict(inputs, embeds, None if text is None else text.inputs(i))
                prediction, logits = output.sample, output.text
                unconditional = predict(inputs, null).sample if guided else prediction
            if guided:
                prediction = unconditional + scale * (prediction - unconditional)

            # 2. Both modalities move to their next times
            video = solver.step(prediction, i, video)
            if text is not None:
                assert logits is not None
                text.advance(i, logits)
            if on_step is not None:
                words, text_time = (None, None) if text is None else (text.state, text.times[i + 1])
                on_step(StepState(i, num_steps, video, solver.next_time(i), words, text_time, i + 1 == num_steps))
        return video

    # ---------------------------------------------------------------------- text with a video that does not change

    def _caption_contexts(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        null_embeds: torch.Tensor | None,
        generator: Generators,
    ) -> list[VideoContext]:
        """The clean video with its condition, and for guidance the video and condition to contrast it with.

        The noise of ``caption_guidance`` "video" reads text in every model, so caching it is always an approximation.
        """
        batch, options = latents.shape[0], self.options
        embeds = self._cast(prompt_embeds.expand(batch, -1, -1))
        refresh = options.caption_refresh if self.model.config.clean_video_reads_text else None
        clean = VideoContext(self._cast(latents), _timestep(1.0, latents), embeds, refresh)
        if options.caption_guidance_scale == 1:
            return [clean]
        if options.caption_guidance == "video":
            noise = self._cast(self._noise(latents, latents.shape[1:], generator))
            return [clean, VideoContext(noise, _timestep(0.0, latents), embeds, options.caption_refresh)]
        if null_embeds is None:
            raise ValueError("null_embeds=None: sampling.caption_guidance='prompt' needs the encoded empty prompt")
        null = self._cast(null_embeds.expand(batch, -1, -1))
        return [clean, VideoContext(clean.latents, clean.timestep, null, refresh)]

    def _denoise_text(
        self, text: TextRun, start: int, contexts: list[VideoContext], on_step: StepCallback | None
    ) -> None:
        """The loop over the text's steps from ``start``, until they end or every text of the batch does."""
        scale, num_steps = self.options.caption_guidance_scale, len(text.times) - 1
        for i in range(start, num_steps):
            shown = text.inputs(i)
            logits, *contrast = [context.logits(self.model, i - start, shown) for context in contexts]
            if contrast:
                logits = contrast[0] + scale * (logits - contrast[0])
            text.advance(i, logits)
            last = i + 1 == num_steps
            if self.eos_token_id is not None and self.pad_token_id is not None:
                text.state, ended = text.flow.close(text.state, self.eos_token_id, self.pad_token_id)
                last = last or ended
            if on_step is not None:
                on_step(StepState(i, num_steps, contexts[0].latents, 1.0, text.state, text.times[i + 1], last))
            if last:
                break

    def _start_text(self, like: torch.Tensor, length: int, num_steps: int, generator: Generators) -> TextRun:
        """Text from noise for as many samples as ``like`` has."""
        flow = self.text_flow.bind(self.model)
        state = flow.initial(like.shape[0], length, generator, like.device)
        return TextRun(flow, state, [flow.warp(t) for t in uniform_times(num_steps)], generator)

    def _solver(self, start: float = 0.0) -> VideoSolver:
        solver = self.scheduler if self.options.solver == "scheduler" else self.options.solver
        return make_video_solver(solver, self.options.num_inference_steps, self.shift, start)

    def _noise(self, like: torch.Tensor, shape: Sequence[int], generator: Generators) -> torch.Tensor:
        return randn((like.shape[0], *shape), generator, like.device)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the model's type; the state between steps is float32."""
        return tensor.to(self.model.dtype)


def _timestep(time: float, like: torch.Tensor) -> torch.Tensor:
    """Wan's timestep of a flow time, float32 [B]."""
    value = NUM_TRAIN_TIMESTEPS * (1.0 - time)
    return torch.full((like.shape[0],), value, dtype=torch.float32, device=like.device)


def uniform_times(num_steps: int) -> list[float]:
    """Flow times 0, 1/n, ..., 1."""
    return [i / num_steps for i in range(num_steps + 1)]
