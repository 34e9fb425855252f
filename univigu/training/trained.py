"""Which weights are trained: by what the configuration chooses, and by the rates of the stage."""

from __future__ import annotations

from typing import Literal

from torch import nn

from univigu.models.lora import is_lora_parameter
from univigu.models.transformer import is_text_parameter
from univigu.training.stages import Stage

Trains = Literal["all", "text", "lora"]
"""All weights, the text stream's alone, or the text stream's and low-rank adapters in place of the pretrained ones."""
Groups = dict[str, list[tuple[str, nn.Parameter]]]


def parameter_groups(model: nn.Module, trains: Trains) -> Groups:
    """Named parameters that may be trained: the generator's (or its adapters'), "video", and the text stream's."""
    groups: Groups = {"video": [], "text": []}
    for name, parameter in model.named_parameters():
        if is_text_parameter(name):
            groups["text"].append((name, parameter))
        elif trains == "all" or (trains == "lora" and is_lora_parameter(name)):
            groups["video"].append((name, parameter))
    return groups


def train_only(model: nn.Module, trains: Trains, stage: Stage) -> None:
    """Let those parameters have gradients whose rate in the stage is over 0, and no others."""
    model.requires_grad_(False)
    for name, members in parameter_groups(model, trains).items():
        rate = stage.text_learning_rate if name == "text" else stage.learning_rate
        for _, parameter in members:
            parameter.requires_grad_(rate > 0)


def check_stage(trains: Trains, stage: Stage) -> None:
    """Raise ValueError for a stage some of whose samples teach nothing that is trained."""
    if trains == "text" and stage.tasks.generate > 0:
        raise ValueError(
            f"model.trains='text': stage {stage.name!r} has tasks.generate={stage.tasks.generate!r}, of which the text "
            "stream learns nothing; expected 0"
        )
