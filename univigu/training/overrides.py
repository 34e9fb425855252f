"""Changing items of a configuration's lists from another configuration.

A later ``--config`` replaces a list as a whole. What changes with the scale of the model (a stage's steps and rates,
how often videos are drawn) stands inside ``trainer.callbacks``, so an overlay names it instead::

    overrides:
      stages: {recall: {steps: 5000}}               # fields of univigu.training.stages.Stage, by the stage's name
      callbacks: {MediaLogger: {num_samples: 1}}    # arguments of callbacks, by the class's name
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from jsonargparse import Namespace

from univigu.flow.objective import TaskMixture
from univigu.training.stages import Stage


@dataclass
class Overrides:
    """Changes to ``trainer.callbacks``; those of stages and callbacks that a run does not have are left aside."""

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fields of stages by the stage's name."""
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arguments of callbacks by the class's name."""

    def __post_init__(self) -> None:
        known = {option.name for option in fields(Stage)} - {"name"}
        for name, values in self.stages.items():
            for option in values.keys() - known:
                raise ValueError(f"overrides.stages.{name}.{option}: no such field; stages have {sorted(known)}")
            if unknown := set(values.get("tasks", {})) - {option.name for option in fields(TaskMixture)}:
                raise ValueError(f"overrides.stages.{name}.tasks.{unknown.pop()}: no such task")


def apply_overrides(overrides: Overrides, callbacks: list[Namespace]) -> None:
    """Change callbacks as parsed from a configuration, in place.

    Args:
        callbacks: each with ``class_path`` and perhaps ``init_args``.
    """
    for callback in callbacks:
        name, arguments = callback.class_path.rpartition(".")[2], callback.get("init_args")
        if name in overrides.callbacks:
            arguments = arguments if arguments is not None else Namespace()
            arguments.update(Namespace(**overrides.callbacks[name]))
            callback.init_args = arguments
        if name == "StageSwitch" and arguments is not None:
            for stage in arguments.stages:
                _change_stage(stage, overrides.stages.get(stage["name"], {}))


def _change_stage(stage: Namespace, changes: dict[str, Any]) -> None:
    for option, value in changes.items():
        if option in ("tasks", "condition_dropout"):
            for task, share in value.items():
                stage[option][task] = share
        else:
            stage[option] = value
