"""The uni-flow objective: one batch, three tasks, two losses (arXiv:2604.08121, section 3).

joint       video at time t_v, text at its own time t_x    -> video loss and text loss
understand  clean video (t_v = 1), text at time t_x        -> text loss
generate    video at time t_v, no text stream              -> video loss
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from univigu.flow.inputs import TextInputs
from univigu.flow.random import rand, randn
from univigu.flow.score import TextScore
from univigu.flow.text import CorruptedText, TextFlow
from univigu.flow.time import TextTimeSampling, VideoTimeSampling, to_timestep
from univigu.flow.video import flow_matching_loss, interpolate


@dataclass
class TaskMixture:
    """Shares of a batch given to each task; they are normalised to sum 1."""

    joint: float = 0.25
    """Both modalities noisy, each at its own time."""
    understand: float = 0.5
    """Clean video, noisy text."""
    generate: float = 0.25
    """Noisy video alone."""

    def __post_init__(self) -> None:
        for option in fields(self):
            if getattr(self, option.name) < 0:
                raise ValueError(f"tasks.{option.name}={getattr(self, option.name)!r}: expected at least 0")
        if self.joint + self.understand + self.generate <= 0:
            raise ValueError("tasks: at least one of joint, understand, generate must be over 0")

    def counts(self, batch_size: int, step: int) -> tuple[int, int, int]:
        """How many samples of a batch each task gets at a training step.

        Shares that do not divide the batch are made up for over the following steps.  No randomness: every
        rank and a resumed run split alike.
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
        for option in fields(self):
            if not 0 <= getattr(self, option.name) <= 1:
                value = getattr(self, option.name)
                raise ValueError(f"condition_dropout.{option.name}={value!r}: expected a number in [0, 1]")


NO_DROPOUT = ConditionDropout(0.0, 0.0, 0.0)


@dataclass
class FlowOptions:
    """How times are drawn, and how much of the text's loss is computed at once."""

    video_times: VideoTimeSampling = field(default_factory=VideoTimeSampling)
    """Distribution of the video's flow time."""
    text_times: TextTimeSampling = field(default_factory=TextTimeSampling)
    """Distribution of the text's flow time."""
    max_logits: int = 2**21
    """Most numbers of a tensor of logits (tokens times vocabulary) in training; a loss over more of them is computed
    in parts, whose logits are computed twice."""

    def __post_init__(self) -> None:
        if self.max_logits < 1:
            raise ValueError(f"flow.max_logits={self.max_logits!r}: expected at least 1")


@dataclass
class UniFlowBatch:
    """What the objective needs to know about some samples."""

    latents: torch.Tensor
    """Clean normalised video latents [B, C, T, H, W]."""
    prompt_embeds: torch.Tensor
    """Encoded prompts [B, S, text_dim]."""
    null_embeds: torch.Tensor
    """The encoded empty prompt [1, S, text_dim]."""
    text_ids: torch.Tensor | None = None
    """Target tokens [B, L]; None where no text is learned."""

    def pad_prompts(self, length: int) -> UniFlowBatch:
        """The same with prompt embeddings zero-padded to a slot of ``length`` (never cut)."""
        missing = max(0, length - self.prompt_embeds.shape[1])
        pad = torch.nn.functional.pad
        return replace(
            self,
            prompt_embeds=pad(self.prompt_embeds, (0, 0, 0, missing)),
            null_embeds=pad(self.null_embeds, (0, 0, 0, missing)),
        )


@dataclass
class UniFlowLosses:
    """Losses of a batch; a modality without samples has empty tensors."""

    video: torch.Tensor
    """Video flow-matching loss a sample [Bv]."""
    video_times: torch.Tensor
    """Flow times of those samples [Bv]."""
    text: torch.Tensor
    """Text loss a sample, mean over its tokens [Bt]."""
    text_times: torch.Tensor
    """Flow times of those samples [Bt]."""

    def total(self, video_weight: float, text_weight: float, batch_size: int) -> torch.Tensor:
        """Weighted sum; each sample of the batch counts once, whatever its task."""
        return (video_weight * self.video.sum() + text_weight * self.text.sum()) / batch_size


def by_noise_level(losses: torch.Tensor, times: torch.Tensor, num_bins: int = 4) -> dict[str, torch.Tensor]:
    """Mean loss in equal ranges of flow time, named like "t0.25-0.50"; ranges without a sample are left out."""
    bins = (times * num_bins).long().clamp(0, num_bins - 1)
    named = {f"t{i / num_bins:.2f}-{(i + 1) / num_bins:.2f}": losses[bins == i] for i in range(num_bins)}
    return {name: values.mean() for name, values in named.items() if values.numel()}


def num_positions(length: int, share: float) -> int:
    """Number of positions in a share of a text's slot; at least one."""
    return max(1, round(share * length))


def sample_positions(
    batch: int, length: int, share: float, device: torch.device, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Random positions of a text that a training step uses: int64 [B, K], ascending, K = share * length.

    A step on fewer tokens is cheaper, and each token's loss differs only by the smaller context.

    Args:
        share: over 0, at most 1; at least one position is kept.
    """
    count = num_positions(length, share)
    return rand((batch, length), generator, device).topk(count, dim=1).indices.sort(dim=1).values


class UniFlowObjective:
    """Computes both modalities' losses for a batch.

    Args:
        text_flow: the text's process; its state and loss.
        options: how times are drawn.
    """

    def __init__(self, text_flow: TextFlow, options: FlowOptions | None = None) -> None:
        self.text_flow = text_flow
        self.options = options or FlowOptions()

    def __call__(
        self,
        model: torch.nn.Module,
        batch: UniFlowBatch,
        counts: Sequence[int],
        dropout: ConditionDropout = NO_DROPOUT,
        text_loss: str = "cross_entropy",
        generator: torch.Generator | None = None,
        text_share: float = 1.0,
    ) -> UniFlowLosses:
        """Noise the batch, run the model, measure.

        Args:
            model: a UniViGUTransformer3DModel (or its wrapper).
            batch: the samples; they are given to the tasks in order, which a shuffled batch makes random.
            counts: how many samples are (joint, understand, generate); their sum is the batch size.
            dropout: probabilities of the null condition.
            text_loss: "cross_entropy" or "generalized_kl" (discrete flows).
            generator: source of all randomness.
            text_share: share of the text's slot that the model is given, see :func:`sample_positions`.
        """
        joint, understand, generate = counts
        with_text = joint + understand
        if with_text + generate != batch.latents.shape[0]:
            raise ValueError(f"counts={tuple(counts)}: expected a sum of {batch.latents.shape[0]}, the batch size")
        device = batch.latents.device
        rates = [dropout.joint] * joint + [dropout.understand] * understand + [dropout.generate] * generate
        dropped = rand((with_text + generate,), generator, device) < torch.tensor(rates, device=device)
        embeds = torch.where(dropped[:, None, None], batch.null_embeds, batch.prompt_embeds)

        # Clean rows keep t = 1, where the interpolation is the data itself.
        t_video = self.options.video_times.sample(with_text + generate, device, generator)
        t_video[joint:with_text] = 1.0
        noise = randn(batch.latents.shape, generator, device)
        noisy = interpolate(noise, batch.latents, t_video)

        empty = batch.latents.new_zeros(0)
        video, times, text, text_times = [empty], [empty], empty, empty
        if with_text:
            rows = slice(0, with_text)
            text_times, text, prediction = self._with_text(
                model, noisy[rows], t_video[rows], embeds[rows], batch, (joint, understand), text_loss, generator,
                text_share,
            )  # fmt: skip
            if joint:
                video.append(flow_matching_loss(prediction, noise[:joint], batch.latents[:joint]))
                times.append(t_video[:joint])
        if generate:
            rows = slice(with_text, None)
            prediction = model(noisy[rows], to_timestep(t_video[rows]), embeds[rows]).sample
            video.append(flow_matching_loss(prediction, noise[rows], batch.latents[rows]))
            times.append(t_video[rows])
        return UniFlowLosses(torch.cat(video), torch.cat(times), text, text_times)

    def _with_text(
        self,
        model: torch.nn.Module,
        noisy: torch.Tensor,
        t_video: torch.Tensor,
        embeds: torch.Tensor,
        batch: UniFlowBatch,
        counts: tuple[int, int],
        text_loss: str,
        generator: torch.Generator | None,
        text_share: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Text times [b] and losses [b] of the rows that carry text, and the joint rows' video prediction.

        Each task has a forward pass of its own: what the backward pass then need not go through (the clean video of
        a generator that does not read text and is not trained) costs nothing.
        """
        if batch.text_ids is None:
            raise ValueError("text_ids=None: tasks joint and understand need target tokens")
        table = model.token_table() if self.text_flow.needs_table else None  # type: ignore[operator]
        t_text = self.options.text_times.sample(sum(counts), noisy.device, generator)
        tokens, positions = batch.text_ids[: sum(counts)], None
        if text_share < 1:
            positions = sample_positions(tokens.shape[0], tokens.shape[1], text_share, tokens.device, generator)
            tokens = tokens.gather(1, positions)
        corrupted = self.text_flow.corrupt(tokens, t_text, table, generator)
        losses, videos, start = [], [], 0
        for count in counts:
            if not count:
                continue
            rows, start = slice(start, start + count), start + count
            part = CorruptedText(*(None if value is None else value[rows] for value in corrupted))  # type: ignore[arg-type]
            score = TextScore(self.text_flow, part, t_text[rows], table, text_loss, self.options.max_logits)
            times = to_timestep(t_video[rows]), to_timestep(t_text[rows])
            text = TextInputs(part.x_t, times[1], None, None if positions is None else positions[rows], score.reader)
            output = model(noisy[rows], times[0], embeds[rows], text)
            losses.append(score.losses(output.text).mean(dim=1))
            videos.append(output.sample)
        return t_text, torch.cat(losses), videos[0]
