"""The uni-flow objective: one batch, three tasks, two losses (arXiv:2604.08121, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from univigu.flow.random import make_generator, rand, randn
from univigu.flow.text import TextFlow, TextInputs
from univigu.flow.time import sample_text_times, sample_video_times, to_timestep
from univigu.flow.video import flow_matching_loss, interpolate


@dataclass
class TaskMixture:
    """Shares of a batch given to each task; they are normalised to sum 1."""

    joint: float = 0.25
    """Both modalities noisy, each at its own time; losses of both."""
    understand: float = 0.5
    """Clean video, noisy text; loss of the text."""
    generate: float = 0.25
    """Noisy video without text; loss of the video."""

    def __post_init__(self) -> None:
        _check_range("tasks", self, math.inf)
        if self.joint + self.understand + self.generate <= 0:
            raise ValueError("tasks: at least one of joint, understand, generate must be over 0")

    def counts(self, batch_size: int, step: int) -> tuple[int, int, int]:
        """How many samples of a batch each task gets at a training step.

        Rounding is made up for over the following steps. No randomness: all ranks and a resumed run split alike.
        """
        rest = self.understand + self.generate

        def assigned(samples: int) -> tuple[int, int, int]:  # of all samples so far; no count ever falls
            joint = _share(samples, self.joint / (self.joint + rest))
            understand = _share(samples - joint, self.understand / rest) if rest else 0
            return joint, understand, samples - joint - understand

        before, after = assigned(step * batch_size), assigned((step + 1) * batch_size)
        return after[0] - before[0], after[1] - before[1], after[2] - before[2]


def _share(samples: int, share: float) -> int:
    return int(round(samples * share, 6))  # rounded first: 0.3 * 10 must not be 2


@dataclass
class ConditionDropout:
    """Probability by task that a sample's prompt is replaced by the null condition."""

    joint: float = 0.5
    """Where both modalities are noisy."""
    understand: float = 0.5
    """Where text is read off clean video."""
    generate: float = 0.1
    """Where only the video is learned, for classifier-free guidance."""

    def __post_init__(self) -> None:
        _check_range("condition_dropout", self, 1.0)


def _check_range(name: str, options: TaskMixture | ConditionDropout, high: float) -> None:
    for task, value in vars(options).items():
        if not 0 <= value <= high:
            raise ValueError(f"{name}.{task}={value!r}: expected a number in [0, {high:g}]")


NO_DROPOUT = ConditionDropout(0.0, 0.0, 0.0)
MAX_LOGITS = 2**21
"""Largest number of logits (tokens times vocabulary) held at once; a loss over more of them is computed in parts, and
their logits twice."""


@dataclass
class UniFlowBatch:
    """Samples of a training step."""

    latents: torch.Tensor
    """Clean normalised video latents [B, C, T, H, W]."""
    prompt_embeds: torch.Tensor
    """[B, S, text_dim]."""
    null_embeds: torch.Tensor
    """The encoded empty prompt [1, S, text_dim]."""
    text_ids: torch.Tensor | None = None
    """Target tokens [B, L]; None where no text is learned."""


@dataclass
class UniFlowLosses:
    """Losses of a batch and their flow times; a modality without samples has empty tensors."""

    video: torch.Tensor
    """Video flow-matching loss a sample [Bv]."""
    video_times: torch.Tensor
    text: torch.Tensor
    """Text loss a sample, mean over its tokens [Bt]."""
    text_times: torch.Tensor
    teacher: torch.Tensor | None = None
    """Mean squared distance to the teacher's prediction a sample [Bg]; None without a teacher."""

    def total(self, batch_size: int, teacher_weight: float = 1.0, text_weight: float = 1.0) -> torch.Tensor:
        """Sum over modalities; each sample of the batch counts once, whatever its task."""
        total = self.video.sum() + text_weight * self.text.sum()
        if self.teacher is not None:
            total = total + teacher_weight * self.teacher.sum()
        return total / batch_size


def by_noise_level(losses: torch.Tensor, times: torch.Tensor, num_bins: int = 4) -> dict[str, torch.Tensor]:
    """Mean loss in equal ranges of flow time, named like "t0.25-0.50"; ranges without a sample are left out."""
    bins = (times * num_bins).long().clamp(0, num_bins - 1)
    named = {f"t{i / num_bins:.2f}-{(i + 1) / num_bins:.2f}": losses[bins == i] for i in range(num_bins)}
    return {name: values.mean() for name, values in named.items() if values.numel()}


def num_positions(length: int, share: float) -> int:
    """Number of positions in a share of a text's slot; at least one."""
    return max(1, round(share * length))


@dataclass(frozen=True)
class PerToken:
    """A function of each token's logits; a ``univigu.flow.text.TextReader``."""

    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """Of logits [b, l, V], x_t and tokens [b, l]; its result [b, l, ...] for a token depends on that token's only."""
    x_t: torch.Tensor
    tokens: torch.Tensor
    """The data's tokens [B, L]."""
    max_logits: int
    """See ``MAX_LOGITS``."""

    def __call__(self, hidden: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """The function's result [B, L, ...], given hidden states [B, L, D] and the linear layer D -> V."""
        if self.tokens.numel() * linear.out_features <= self.max_logits:
            return self.function(linear(hidden), self.x_t, self.tokens)

        def part(hidden: torch.Tensor, x_t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            """Each token as a text of its own."""
            return self.function(linear(hidden)[:, None], x_t[:, None], tokens[:, None])

        size = max(1, self.max_logits // linear.out_features)
        parts = zip(*(x.flatten(0, 1).split(size) for x in (hidden, self.x_t, self.tokens)), strict=True)
        results = [checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False) for inputs in parts]
        return torch.cat(results).squeeze(1).unflatten(0, self.tokens.shape)


@dataclass
class UniFlowObjective:
    """Computes both modalities' losses for a batch."""

    text_flow: TextFlow
    shift: float = 3.0
    """Timestep shift of the video, above 0; the sampler should use the same one. 1 is no shift."""
    text_time_power: float = 1.0
    """Power of the text's times, above 0, see ``univigu.flow.time.sample_text_times``."""
    clean_video_reads_prompt: bool = True
    """As in ``univigu.models.options.ArchitectureOptions``."""

    def __call__(
        self,
        model: torch.nn.Module,
        batch: UniFlowBatch,
        counts: Sequence[int],
        dropout: ConditionDropout = NO_DROPOUT,
        generator: torch.Generator | None = None,
        text_share: float = 1.0,
        step: int | None = None,
        teacher: torch.nn.Module | None = None,
    ) -> UniFlowLosses:
        """Add noise to the batch, run the model and compute the losses.

        Args:
            counts: how many samples are (joint, understand, generate); their sum is the batch size. Samples are given
                to the tasks in order, which a shuffled batch makes random.
            text_share: share of the text's positions that the model is given, random ones in ascending order. A step on
                fewer tokens is cheaper, and each token's loss differs only by the smaller context.
            step: number of the training step, the same in all processes; in a random half of the steps a
                self-conditioned text flow takes a second forward pass. None takes none.
            teacher: a frozen video transformer whose predictions are the target of ``generate`` in place of the data.
                They vary less than the noise of flow matching, so they keep the pretrained prior at little cost.
        """
        joint, understand, generate = counts
        size, device = batch.latents.shape[0], batch.latents.device
        if sum(counts) != size:
            raise ValueError(f"counts={tuple(counts)}: expected a sum of {size}, the batch size")

        # 1. Conditions
        rates = [dropout.joint] * joint + [dropout.understand] * understand + [dropout.generate] * generate
        dropped = rand((size,), generator, device) < torch.tensor(rates, device=device)
        embeds = torch.where(dropped[:, None, None], batch.null_embeds, batch.prompt_embeds)

        # 2. Both modalities with noise; clean video keeps t = 1, where the interpolation is the data itself
        t_video = sample_video_times(size, self.shift, device, generator)
        t_video[joint : joint + understand] = 1.0
        noise = randn(batch.latents.shape, generator, device)
        noisy = interpolate(noise, batch.latents, t_video)
        flow, texts, empty = self.text_flow, None, batch.latents.new_zeros(0)
        tokens = text_times = empty
        if joint + understand:
            flow = flow.bind(model)
            texts, tokens, text_times = self._corrupt(flow, batch, joint + understand, text_share, generator)
        twice = step is not None and bool(torch.rand((), generator=make_generator("cpu", step)) < 0.5)

        # 3. A forward pass for each task, so that none goes backward through the clean video of a frozen generator
        video, times, text, start, distances = [empty], [empty], [empty], 0, None
        for task, count in zip(("joint", "understand", "generate"), counts, strict=True):
            if not count:
                continue
            rows, start = slice(start, start + count), start + count
            inputs = (noisy[rows], to_timestep(t_video[rows]), embeds[rows])
            if texts is None or task == "generate":
                output = model(*inputs)
            else:
                loss = PerToken(flow.loss, texts.tokens[rows], tokens[rows], MAX_LOGITS)
                shown = TextInputs(texts.tokens[rows], texts.timestep[rows], reader=loss)
                if texts.positions is not None:
                    shown = shown._replace(positions=texts.positions[rows])
                if task == "understand" and not self.clean_video_reads_prompt:
                    inputs = (*inputs[:2], batch.null_embeds.expand(count, -1, -1))
                    shown = shown._replace(prompt_embeds=embeds[rows])
                if flow.self_conditioning and twice:
                    shown = _self_conditioned(flow, model, inputs, shown)
                output = model(*inputs, shown)
                text.append(output.text.mean(dim=1))
            if task == "generate" and teacher is not None:
                with torch.no_grad():
                    (target,) = teacher(*inputs, return_dict=False)
                distances = (output.sample.float() - target.float()).square().flatten(1).mean(dim=1)
            elif task != "understand":
                video.append(flow_matching_loss(output.sample, noise[rows], batch.latents[rows]))
                times.append(t_video[rows])
        return UniFlowLosses(torch.cat(video), torch.cat(times), torch.cat(text), text_times, distances)

    def _corrupt(
        self, flow: TextFlow, batch: UniFlowBatch, count: int, share: float, generator: torch.Generator | None
    ) -> tuple[TextInputs, torch.Tensor, torch.Tensor]:
        """The first ``count`` samples' texts at random times: the model's inputs, the data's tokens, and the times."""
        if batch.text_ids is None:
            raise ValueError("text_ids=None: tasks joint and understand need target tokens")
        tokens, positions = batch.text_ids[:count], None
        t = flow.warp(sample_text_times(count, self.text_time_power, tokens.device, generator))
        if share < 1:
            kept = num_positions(tokens.shape[1], share)
            positions = rand(tokens.shape, generator, tokens.device).topk(kept, dim=1).indices.sort(dim=1).values
            tokens = tokens.gather(1, positions)
        return TextInputs(flow.corrupt(tokens, t, generator), to_timestep(t), positions=positions), tokens, t


@torch.no_grad()
def _self_conditioned(flow: Any, model: nn.Module, video: tuple[torch.Tensor, ...], text: TextInputs) -> TextInputs:
    """The same inputs with the model's own prediction of the data, as in sampling after the first step."""
    assert isinstance(text.reader, PerToken)
    reader = replace(text.reader, function=lambda logits, *_: flow.endpoint(logits))
    return text._replace(endpoint=model(*video, text._replace(reader=reader)).text)
