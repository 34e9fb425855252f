"""Training stages: as configuration, and the callback that puts the stages of a run in force, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, cos, isfinite, pi
from typing import Any, Literal

from lightning import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from univigu.flow.objective import ConditionDropout, TaskMixture
from univigu.training.optim import trained_and_frozen

SHIPPED_STAGES = ("foundation", "recall", "refine")  # an overlay may configure those that a run does not have
FULL_TEXT_FROM = 0.6
"""Fraction of a stage's steps after which training uses all positions of the text, as sampling does."""
FINAL_RATE = 0.02
"""Learning rate at the end of the cosine, relative to the peak."""


@dataclass
class Stage:
    """One stage of training."""

    steps: int = 1000
    """Optimizer steps of the stage; the learning rate decays over them."""
    target: Literal["prompt", "caption"] = "prompt"
    """Which text of the sample is the target of the text flow."""
    text_length: int = 256
    """Length of the target text in tokens, its end-of-sequence token included."""
    text_share: float = 1.0
    """Share of the target's positions, drawn for each sample and step, that the model sees in training until
    ``FULL_TEXT_FROM``. Below 1 a step costs less."""
    text_time_power: float = 4.0
    """Training draws the text's flow time as ``u ** text_time_power``, u uniform; above 1 favours noisy text."""
    tasks: TaskMixture = field(default_factory=lambda: TaskMixture(0.125, 0.625, 0.25))
    """Share of a batch for each task."""
    question_share: float = 0.0
    """Share of the steps whose ``joint`` and ``understand`` samples learn to answer a question about the clean clip,
    one of the sample's ``qa``, instead of the target text."""
    question_weights: dict[str, float] = field(default_factory=dict)
    """How often questions of a ``kind`` are drawn, relative to the sample's others, which have 1; 0 leaves them out."""
    condition_dropout: ConditionDropout = field(default_factory=lambda: ConditionDropout(0.5, 0.9, 0.1))
    """Probability, by task, that the prompt is replaced by the encoded empty prompt."""
    learning_rate: float | None = None
    """Peak learning rate of the pretrained weights (or of the adapters). None takes ``model.optimizer.learning_rate``;
    0 freezes them."""
    text_learning_rate: float | None = None
    """Peak learning rate of the text stream's weights. None takes ``model.optimizer.text_learning_rate``; 0 freezes
    them."""
    teacher_weight: float = 8.0
    """Over 0: the generate share is trained towards the predictions of the frozen foundation, with this weight, and not
    on the data. It keeps the pretrained generator's samples while its weights learn to show text what they see."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""

    def __post_init__(self) -> None:
        rate, text_rate = self.learning_rate, self.text_learning_rate
        trains_text = self.writes_text and text_rate != 0
        unused = rate == 0 and self.tasks.generate > 0
        for name, valid, expected in (
            ("steps", self.steps >= 1, "at least 1"),
            ("target", self.target in ("prompt", "caption"), "'prompt' or 'caption'"),
            ("text_length", self.text_length >= 2, "at least 2"),
            ("text_share", 0.0 < self.text_share <= 1.0, "over 0, at most 1"),
            ("question_share", 0.0 <= self.question_share <= 1.0, "a number in [0, 1]"),
            ("question_weights", min(self.question_weights.values(), default=0) >= 0, "numbers of at least 0"),
            ("text_time_power", self.text_time_power > 0, "over 0"),
            ("teacher_weight", self.teacher_weight >= 0, "at least 0"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("learning_rate", rate is None or rate >= 0, "at least 0"),
            ("text_learning_rate", text_rate is None or text_rate >= 0, "at least 0"),
            ("learning_rate", rate != 0 or trains_text, "over 0, because nothing else is trained"),
            ("tasks", not unused, "no generate share if learning_rate is 0, because it would train nothing"),
        ):
            if not valid:
                raise ValueError(f"stage: {name}={getattr(self, name)!r}: expected {expected}")

    @property
    def writes_text(self) -> bool:
        """Whether the text stream is trained; if not, its output means nothing."""
        return self.tasks.joint + self.tasks.understand > 0

    def text_share_at(self, step: int) -> float:
        """Share of the target's positions in use; ``step`` counts from the start of the stage."""
        return self.text_share if step < FULL_TEXT_FROM * self.steps else 1.0

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine down to ``FINAL_RATE``; ``step`` counts from the start of the stage."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + cos(pi * progress))


def select_stages(stages: Mapping[str, Stage], run: Sequence[str]) -> dict[str, Stage]:
    """The stages of a run, in order; of those that are configured, the ``SHIPPED_STAGES`` may be missing from it.

    Raises:
        ValueError: the run is empty or names a stage that is not configured, or a name in ``stages`` is unknown.
    """
    if not run:
        raise ValueError(f"run={list(run)}: expected names of stages, such as [recall]; configured: {list(stages)}")
    for name in run:
        if name not in stages:
            raise ValueError(f"run={list(run)}: stages.{name} is not configured; configured: {list(stages)}")
    for name in stages:
        if name not in run and name not in SHIPPED_STAGES:
            raise ValueError(f"stages.{name}: no such stage in run={list(run)}")
    return {name: stages[name] for name in run}


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a batch completes an optimizer step; ``StageSwitch`` refuses epochs that end within one."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class StageSwitch(Callback):
    """Switches stages by the global step, sets learning rates, and ends training after the steps of the last stage.

    The command line always adds this callback.
    """

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self.names, self.stages = list(stages), list(stages.values())
        self.index, self._fitting = -1, True

    def locate(self, global_step: int) -> tuple[int, int]:
        """Index of the stage at a global step, and the step counted from the start of that stage."""
        for index, stage in enumerate(self.stages):
            if global_step < stage.steps:
                return index, global_step
            global_step -= stage.steps
        return len(self.stages) - 1, self.stages[-1].steps - 1

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.stages, self.index, self._fitting = self.stages, -1, stage == "fit"
        index = 0 if self._fitting else len(self.stages) - 1  # evaluation refers to the last stage
        pl_module.enter_stage(self.stages[index], self.names[index])

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if every := trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            message = "expected 0, because a new loader would begin with the same samples"
            raise MisconfigurationException(f"trainer.reload_dataloaders_every_n_epochs={every}: {message}")
        longest = getattr(getattr(trainer, "datamodule", None), "longest", {})
        for name, stage in zip(self.names, self.stages, strict=True):
            if stage.writes_text and (size := longest.get(stage.target, 0)) > stage.text_length:
                text = f"stages.{name}.text_length={stage.text_length}: the longest {stage.target} of the data"
                raise MisconfigurationException(f"{text} has {size} tokens, its end included")
        total = sum(stage.steps for stage in self.stages)
        if trainer.max_steps == -1 or trainer.max_steps > total:
            trainer.fit_loop.epoch_loop.max_steps = total

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        length, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
        if not isfinite(length):
            return
        if length % accumulated:  # Lightning would take a step of fewer batches at the end of every epoch
            raise MisconfigurationException(
                f"trainer.accumulate_grad_batches={accumulated}: an epoch has {length} batches (as limited by "
                "trainer.limit_train_batches), no multiple of it"
            )
        if trainer.max_epochs in (None, -1):  # steps end the training; the progress bar shows the number of epochs
            resumed = trainer.global_step > 0  # the interrupted epoch may be counted already
            epochs = ceil((trainer.max_steps - trainer.global_step) * accumulated / length) + resumed
            trainer.fit_loop.max_epochs = trainer.current_epoch + epochs

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        index, step = self.locate(trainer.global_step)
        stage = self.stages[index]
        if index != self.index:
            self.index = index
            pl_module.enter_stage(stage, self.names[index])
            parts = trained_and_frozen(pl_module.transformer)
            rank_zero_info(f"stage {self.names[index]}, {stage.steps} steps: {parts}")
        pl_module.stage_step = step
        factor, rates = stage.learning_rate_factor(step), pl_module.optimizer_options.rates(stage)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates[group["name"].partition("_")[0]] * group["rate"] * factor

    def state_dict(self) -> dict[str, Any]:
        stages = zip(self.names, self.stages, strict=True)
        return {"index": self.index, "stages": [{"name": name, **asdict(stage)} for name, stage in stages]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume with other stages than the checkpoint's, because step numbers would differ in meaning.

        Evaluation accepts any stages: a checkpoint of a two-stage run is evaluated with the second stage's config.
        """
        if not self._fitting:
            return
        saved = [(stage["name"], stage["steps"]) for stage in state_dict["stages"]]
        ours = [(name, stage.steps) for name, stage in zip(self.names, self.stages, strict=True)]
        if saved != ours:
            raise MisconfigurationException(
                f"the checkpoint was made with stages {saved}, the configuration has {ours}; to start a new stage "
                "from its weights use model.init_from instead of ckpt_path"
            )
