"""Puts the training stages in force, one after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from univigu.training.optim import trained_and_frozen
from univigu.training.stages import Stage


class StageSwitch(Callback):
    """Switches stages by optimizer step and sets learning rates within them.

    The stage is a function of the global step, so a resumed run continues in the right stage at the right learning
    rate. Training stops after the steps of the last stage, or earlier by the trainer's options. The command line always
    adds this callback.
    """

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        if not stages:
            raise ValueError("stages={}: expected at least one stage")
        self.names, self.stages = list(stages), list(stages.values())
        self.index = self._announced = -1
        self._fitting = True

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def locate(self, global_step: int) -> tuple[int, int]:
        """Index of the stage at a global step, and the step counted from the start of that stage."""
        for index, stage in enumerate(self.stages):
            if global_step < stage.steps:
                return index, global_step
            global_step -= stage.steps
        return len(self.stages) - 1, self.stages[-1].steps - 1

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        # Evaluation and prediction refer to the last stage.
        pl_module.stages = self.stages
        self._fitting = stage == "fit"
        self._enter(0 if self._fitting else len(self.stages) - 1, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        limit = trainer.max_steps
        if limit == -1 or limit > self.total_steps:
            trainer.fit_loop.epoch_loop.max_steps = self.total_steps

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        length, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
        if not math.isfinite(length):
            return
        if length % accumulated:  # Lightning would take a step of fewer batches at the end of every epoch
            raise MisconfigurationException(
                f"trainer.accumulate_grad_batches={accumulated}: an epoch has {length} batches (as limited by "
                "trainer.limit_train_batches), no multiple of it"
            )
        if trainer.max_epochs in (None, -1):  # steps end the training; the progress bar shows the number of epochs
            resumed = trainer.global_step > 0  # the interrupted epoch may be counted already
            epochs = math.ceil((trainer.max_steps - trainer.global_step) * accumulated / length) + resumed
            trainer.fit_loop.max_epochs = trainer.current_epoch + epochs

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        index, step = self.locate(trainer.global_step)
        if index != self.index:
            self._enter(index, pl_module)
        if index != self._announced:
            self._announced = index
            parts = trained_and_frozen(pl_module.tasks.transformer)
            rank_zero_info(f"stage {self.names[index]}, {self.stages[index].steps} steps: {parts}")
        pl_module.stage_step = step
        factor = self.stages[index].learning_rate_factor(step)
        rates = pl_module.optimizer_options.rates(self.stages[index])
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates[group["name"].partition("_")[0]] * group["rate"] * factor

    def _enter(self, index: int, pl_module: Any) -> None:
        self.index = index
        pl_module.enter_stage(self.stages[index], self.names[index])

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
