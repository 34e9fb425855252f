"""What is learned when: the paper's two training stages, and stage 0 that makes the generator.

A stage is data, not code: which text is the target, how often the condition is dropped, which tasks share a
batch, how the losses are weighed, what is trained and how fast.  ``callbacks.StageSwitch`` puts them in force.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import cos, pi
from typing import Literal

from univigu.flow.objective import ConditionDropout, TaskMixture


@dataclass
class Stage:
    """One stage of training."""

    name: str = "recall"
    """Shown in logs and stored in checkpoints."""
    steps: int = 1000
    """Optimizer steps the stage lasts; the learning rate decays over them."""
    target: Literal["prompt", "caption"] = "prompt"
    """Which text of the sample is denoised."""
    text_length: int = 256
    """Slot of the target text in tokens, its end-of-sequence token counted."""
    tasks: TaskMixture = field(default_factory=TaskMixture)
    """Shares of a batch given to each task."""
    text_share: float = 1.0
    """Share of the slot's places, drawn anew for each sample and step, that the model is shown in training until
    ``whole_text_from``; below 1 a step costs less."""
    whole_text_from: float = 0.5
    """From which fraction of the stage's steps on all places are shown, as sampling does."""
    condition_dropout: ConditionDropout = field(default_factory=ConditionDropout)
    """Probability by task that the prompt is replaced by the encoded empty prompt."""
    video_weight: float = 1.0
    """Weight of the video loss."""
    text_weight: float = 1.0
    """Weight of the text loss."""
    text_loss: Literal["cross_entropy", "generalized_kl"] = "cross_entropy"
    """Loss of the discrete text flows."""
    learning_rate: float = 1e-4
    """Peak learning rate of the pretrained weights; 0 freezes them."""
    text_learning_rate: float = 1e-3
    """Peak learning rate of the text stream's own weights; 0 freezes them."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""
    final_lr_ratio: float = 0.02
    """Learning rate at the end of the cosine, relative to the peak."""

    def __post_init__(self) -> None:
        def check(name: str, fine: bool, expected: str) -> None:
            if not fine:
                raise ValueError(f"stage {self.name!r}: {name}={getattr(self, name)!r}: expected {expected}")

        check("steps", self.steps >= 1, "at least 1")
        check("target", self.target in ("prompt", "caption"), "'prompt' or 'caption'")
        check("text_length", self.text_length >= 2, "at least 2")
        check("text_share", 0.0 < self.text_share <= 1.0, "over 0, at most 1")
        check("warmup_steps", self.warmup_steps >= 0, "at least 0")
        check("text_loss", self.text_loss in ("cross_entropy", "generalized_kl"), "'cross_entropy' or 'generalized_kl'")
        for name in ("final_lr_ratio", "whole_text_from"):
            check(name, 0.0 <= getattr(self, name) <= 1.0, "a number in [0, 1]")
        for name in ("video_weight", "text_weight", "learning_rate", "text_learning_rate"):
            check(name, getattr(self, name) >= 0.0, "at least 0")
        learns_text = self.writes_text and self.text_learning_rate > 0
        check("learning_rate", self.learning_rate > 0 or learns_text, "over 0, as nothing else is trained")
        frozen_share = self.learning_rate == 0 and self.tasks.generate > 0
        check("tasks", not frozen_share, "no generate share where learning_rate is 0: nothing would learn from it")

    @property
    def writes_text(self) -> bool:
        """Whether text is trained at all; else what a model writes means nothing."""
        return self.tasks.joint + self.tasks.understand > 0

    def text_share_at(self, step: int) -> float:
        """The share of the slot that is shown; ``step`` counts from the stage's start."""
        return self.text_share if step < self.whole_text_from * self.steps else 1.0

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine down to ``final_lr_ratio``; ``step`` counts from the stage's start."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * 0.5 * (1 + cos(pi * progress))
