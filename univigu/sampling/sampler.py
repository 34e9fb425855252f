"""Generate, edit, caption, joint: one sampler whose two modalities start at different times.

* ``generate``: video from noise, no text stream; guided by the prompt.
* ``edit``: video from part of the way to noise; guided by another prompt.
* ``caption``: clean video, text from noise; the condition may be a question.
* ``joint``: video and text from noise, in parallel.

A single image is a video of one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from univigu.flow.random import Generators, randn
from univigu.flow.text import EmbeddingFlow, TextFlow, TextInputs, make_text_flow
from univigu.flow.time import NUM_TRAIN_TIMESTEPS
from univigu.flow.video import interpolate
from univigu.models.cache import AttentionCache
from univigu.sampling.options import SamplingOptions
from univigu.sampling.solvers import VideoSolver

Task = Literal["generate", "edit", "caption", "answer", "joint"]
"""An answer is a caption whose prompt is a question."""


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
    """Whether no step follows: at the schedule's end, or once every text of the batch has ended."""


StepCallback = Callable[[StepState], bool | None]
"""Called after each step; a true result ends the sampling there."""


@dataclass
class SampleInputs:
    """What samples are made of. A task needs those that it names."""

    prompt_embeds: torch.Tensor
    """Encoded prompts [B, S, text_dim]. Of a caption the condition, [B or 1, ...]: the encoded empty prompt, a brief
    prompt, or a question, whose answer the text then is. [B * K, ...] are K of them about each video, in its order."""
    null_embeds: torch.Tensor
    """The encoded empty prompt [1, S, text_dim]."""
    latents: torch.Tensor | None = None
    """The clean video, normalised [B, C, T, H, W]: of "caption", "answer" and "edit"."""
    shape: Sequence[int] = ()
    """(C, T, H, W) of a sample: of "generate" and "joint"."""
    text_length: int = 0
    """Number of text tokens: of "caption", "answer" and "joint"."""
    strength: float = 1.0
    """Noise level that "edit" starts at, in (0, 1]; 1 keeps nothing of the video. The sampler's last level that is at
    least as noisy is taken."""
    generator: Generators = None
    """One generator, or one a sample (then a sample does not depend on its batch)."""
    on_step: StepCallback | None = None


@dataclass
class Samples:
    """Results of a task: latents [B, C, T, H, W] (for ``caption`` those given), and tokens [B, L] if there is text."""

    latents: torch.Tensor
    tokens: torch.Tensor | None


class VideoRun:
    """The video of one sampling run, with its guidance; the prompt's keys and values are computed once."""

    def __init__(
        self, model: Any, solver: VideoSolver, state: torch.Tensor, inputs: SampleInputs, options: SamplingOptions
    ) -> None:
        self.model, self.solver, self.state, self.options = model, solver, state, options
        self.prompt = inputs.prompt_embeds.to(model.dtype)
        self.null = inputs.null_embeds.expand(len(state), -1, -1).to(model.dtype)
        self.caches = AttentionCache(keep_video=False), AttentionCache(keep_video=False)

    def advance(self, i: int, text: TextInputs | None) -> torch.Tensor | None:
        """Take step i; returns the text's logits if text is computed along."""
        scale, (low, high) = self.options.guidance_scale, self.options.guidance_interval
        # A pass with prompt and text, and for guidance one with neither.
        video = self.state.to(self.model.dtype), _filled(float(self.solver.timesteps[i]), self.state)
        output = self.model(*video, self.prompt, text=text, cache=self.caches[0])
        prediction = output.sample
        if scale > 1 and low <= self.solver.times[i] <= high:
            unconditional = self.model(*video, self.null, cache=self.caches[1]).sample
            prediction = unconditional + scale * (prediction - unconditional)
        self.state = self.solver.step(prediction, i, self.state)
        return output.text


@dataclass
class VideoContext:
    """A clean video, which does not change while text is denoised; latents and prompt are in the model's type."""

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    """Of each text, [B, S, text_dim], or [B * K, S, text_dim] where K texts share a video."""
    video_embeds: torch.Tensor
    """What the video reads, [B, S, text_dim]."""
    refresh: int | None
    """Recompute it with the text every so many steps; None: compute it once, because it does not depend on the text."""

    def __post_init__(self) -> None:
        self.cache = AttentionCache(keep_video=self.refresh != 1)
        self.video = self.latents, _filled(0.0, self.latents), self.video_embeds

    def logits(self, model: Any, step: int, text: TextInputs) -> torch.Tensor:
        """The model's logits [B, L, V] at a step; the video is computed only when it is due."""
        if self.refresh is not None:
            due = step % self.refresh == 0
            return model(*(self.video if due else [None] * 3), text=text, cache=self.cache, predict_video=False).text
        if step == 0:
            self.cache = AttentionCache(text_tokens=text.tokens.shape[1])
            model(*self.video, cache=self.cache, predict_video=False)
        text = text._replace(prompt_embeds=self.prompt_embeds)
        return model(None, None, None, text=text, cache=self.cache).text


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
        timestep = _filled(NUM_TRAIN_TIMESTEPS * (1.0 - self.times[i]), self.state)
        return TextInputs(self.state, timestep, endpoint=self.endpoint)

    def advance(self, i: int, logits: torch.Tensor) -> None:
        """Take step i, given the logits of its inputs."""
        if isinstance(self.flow, EmbeddingFlow):
            self.endpoint = self.flow.endpoint(logits)
        self.state = self.flow.step(self.state, logits, self.times[i], self.times[i + 1], self.generator)


@dataclass
class Sampler:
    """Draws samples from a unified model."""

    model: Any
    """A UniViGUTransformer3DModel in evaluation mode."""
    scheduler: Any
    """A diffusers scheduler for the video; its class and config are used as a template."""
    options: SamplingOptions = field(default_factory=SamplingOptions)
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    """Of the tokenizer. With both, sampling with the ``mask`` flow stops once the end of every text and everything
    before it is revealed; what follows the end is padding."""

    def __post_init__(self) -> None:
        config, options = self.model.config, self.options
        text_options = {"temperature": options.temperature, "top_p": options.top_p, "order": options.text_order}
        self.text_flow = make_text_flow(config.text_flow, config.vocab_size, **text_options)

    @torch.no_grad()
    def sample(self, task: Task, inputs: SampleInputs) -> Samples:
        """Samples of a task, which is a choice of where each modality starts."""
        options, video, generator = self.options, inputs.latents, inputs.generator
        task, texts = "caption" if task == "answer" else task, 1
        if task == "caption" and video is not None:
            texts = len(inputs.prompt_embeds) // len(video)
        if texts > 1 and not self._shares_video(inputs.prompt_embeds.unflatten(0, (-1, texts))):
            return self._in_turn(inputs, texts)
        if not 0 < inputs.strength <= 1:
            raise ValueError(f"strength={inputs.strength!r}: expected over 0, at most 1")
        run, text, steps = None, None, options.caption_steps
        if task != "caption":
            template = self.scheduler if options.solver == "scheduler" else options.solver
            shift = float(self.scheduler.config.get("flow_shift", self.scheduler.config.get("shift", 1.0)))
            solver = VideoSolver(template, options.num_inference_steps, shift, 1.0 - inputs.strength)
            if video is None:
                embeds = inputs.prompt_embeds
                video = randn((len(embeds), *inputs.shape), generator, embeds.device)
            else:
                noise = randn(video.shape, generator, video.device)
                video = interpolate(noise, video, _filled(solver.times[0], video))
            run, steps = VideoRun(self.model, solver, video, inputs, options), len(solver.times) + options.joint_lag
        assert video is not None
        if task in ("caption", "joint"):
            flow, rows = self.text_flow.bind(self.model), max(len(video), len(inputs.prompt_embeds))
            state = flow.initial(rows, inputs.text_length, generator, video.device)
            text = TextRun(flow, state, [flow.warp(i / steps) for i in range(steps + 1)], generator)
        return self._denoise(inputs, video, run, text)

    def _shares_video(self, prompts: torch.Tensor) -> bool:
        """Whether one pass of each video serves all its texts, exactly: their prompts are [B, K, S, text_dim]."""
        config = self.model.config
        same_for_all = not config.clean_video_reads_prompt or bool((prompts == prompts[:, :1]).all())
        return same_for_all and not config.clean_video_reads_text

    def _in_turn(self, inputs: SampleInputs, texts: int) -> Samples:
        """Each video's texts one after the other, because each of them needs its own pass of the video."""
        assert inputs.latents is not None
        made, generator = [], inputs.generator
        for number in range(texts):
            rows = slice(number, None, texts)
            own = generator[rows] if isinstance(generator, list) else generator
            part = self.sample("caption", replace(inputs, prompt_embeds=inputs.prompt_embeds[rows], generator=own))
            assert part.tokens is not None
            made.append(part.tokens)
        return Samples(inputs.latents, torch.stack(made, dim=1).flatten(0, 1))

    def _denoise(
        self, inputs: SampleInputs, video: torch.Tensor, run: VideoRun | None, text: TextRun | None
    ) -> Samples:
        """The solver's steps of the video, the text along with them if there is any; then the text's other steps."""
        contexts: list[VideoContext] = []
        video_steps = 0 if run is None else len(run.solver.times)
        num_steps = video_steps if text is None else len(text.times) - 1
        for i in range(num_steps):
            shown, video_time, last = None if text is None else text.inputs(i), 1.0, i + 1 == num_steps
            if run is not None and i < video_steps:
                logits = run.advance(i, shown)
                video, video_time = run.state, run.solver.ends[i]
            else:
                if i == video_steps:
                    contexts = self._caption_contexts(video, inputs)
                assert shown is not None
                logits, *contrast = [context.logits(self.model, i - video_steps, shown) for context in contexts]
                if contrast:
                    logits = contrast[0] + self.options.caption_guidance_scale * (logits - contrast[0])
            if text is not None:
                assert logits is not None
                text.advance(i, logits)
                if i >= video_steps and self.eos_token_id is not None and self.pad_token_id is not None:
                    text.state, ended = text.flow.close(text.state, self.eos_token_id, self.pad_token_id)
                    last = last or ended
            if inputs.on_step is not None:
                tokens, text_time = (None, None) if text is None else (text.state, text.times[i + 1])
                last = inputs.on_step(StepState(i, num_steps, video, video_time, tokens, text_time, last)) or last
            if last:
                break
        if text is None:
            return Samples(video, None)
        tokens = text.flow.tokens(text.state)  # with masks where sampling was ended early; they become padding
        return Samples(video, torch.where(tokens < text.flow.vocab_size, tokens, self.pad_token_id or 0))

    def _caption_contexts(self, latents: torch.Tensor, inputs: SampleInputs) -> list[VideoContext]:
        """The clean video with its condition, and for guidance with the null condition."""
        options, config, dtype = self.options, self.model.config, self.model.dtype
        rows = max(len(latents), len(inputs.prompt_embeds))
        embeds, null = (x.expand(rows, -1, -1).to(dtype) for x in (inputs.prompt_embeds, inputs.null_embeds))
        refresh = options.caption_refresh if config.clean_video_reads_text else None
        read = embeds if config.clean_video_reads_prompt else null
        if rows > len(latents):
            read = read[:: rows // len(latents)]
        clean = VideoContext(latents.to(dtype), embeds, read, refresh)
        if options.caption_guidance_scale == 1 or torch.equal(embeds, null):  # nothing to guide towards
            return [clean]
        return [clean, replace(clean, prompt_embeds=null, video_embeds=null[: len(latents)])]


def _filled(value: float, like: torch.Tensor) -> torch.Tensor:
    """A time or timestep for each sample, float32 [B]."""
    return torch.full((len(like),), value, dtype=torch.float32, device=like.device)
