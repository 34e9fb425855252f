"""Puts the training stages in force, one after the other."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from univigu.training.stages import Stage

log = logging.getLogger(__name__)


class StageSwitch(Callback):
    """Switches stages by optimizer step and sets learning rates within them.

    The stage is a function of the global step, so a resumed run is in the stage, and at the learning rate, it
    would have been in.  What the checkpoint stores is checked against the configuration on resume.

    Args:
        stages: the stages in order; training stops after the last one's steps.
    """

    def __init__(self, stages: list[Stage]) -> None:
        if not stages:
            raise ValueError("stages=[]: expected at least one stage")
        self.stages = stages
        self.index = -1
        self._fitting = True

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def locate(self, global_step: int) -> tuple[int, int]:
        """Index of the stage a global step belongs to, and the step counted from that stage's start."""
        for index, stage in enumerate(self.stages):
            if global_step < stage.steps:
                return index, global_step
            global_step -= stage.steps
        return len(self.stages) - 1, self.stages[-1].steps - 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Outside of fit the last stage is what evaluation and prediction refer to.
        self._fitting = stage == "fit"
        self._enter(0 if stage == "fit" else len(self.stages) - 1, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        limit = trainer.max_steps
        if limit == -1 or limit > self.total_steps:
            trainer.fit_loop.epoch_loop.max_steps = self.total_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Steps end the training; as many epochs as they take must be allowed (and are what the progress bar shows).
        batches = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        if math.isfinite(trainer.num_training_batches):
            resumed = trainer.global_step > 0  # the epoch it was cut off in may be counted already
            epochs = math.ceil(batches / trainer.num_training_batches) + resumed
            trainer.fit_loop.max_epochs = trainer.current_epoch + epochs

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        index, step = self.locate(trainer.global_step)
        if index != self.index:
            self._enter(index, pl_module)
        stage = self.stages[index]
        pl_module.stage_step = step  # type: ignore[assignment]
        factor = stage.learning_rate_factor(step)
        rates = {"video": stage.learning_rate, "text": stage.text_learning_rate}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates[group["name"]] * group["rate"] * factor

    def _enter(self, index: int, pl_module: LightningModule) -> None:
        self.index = index
        stage = self.stages[index]
        log.info("stage %s: %s", stage.name, stage)
        pl_module.enter_stage(stage)  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index, "stages": [asdict(stage) for stage in self.stages]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume into other stages than the checkpoint's: step numbers would mean something else.

        Evaluation takes any: a checkpoint of both stages in one fit is evaluated with the second one's configuration.
        """
        if not self._fitting:
            return
        saved = [(stage["name"], stage["steps"]) for stage in state_dict["stages"]]
        ours = [(stage.name, stage.steps) for stage in self.stages]
        if saved != ours:
            raise MisconfigurationException(
                f"the checkpoint was made with stages {saved}, the configuration has {ours}; to start a new stage "
                "from its weights use model.init_from instead of ckpt_path"
            )
