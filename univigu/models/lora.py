"""Low-rank adapters on the shared attention (Hu et al., 2021, arXiv:2106.09685), by peft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from univigu.models.transformer import UniViGUTransformer3DModel

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names


@dataclass
class LoraOptions:
    """Adapters of the attention's projections: ``W x + alpha / rank * B A x``."""

    rank: int = 32
    """Width of the bottleneck, at least 1."""
    alpha: int = 32
    """The adapters' output is scaled by alpha / rank; at least 1."""
    attention: tuple[str, ...] = ("attn1", "attn2")
    """Which attention layers: "attn1" is the self-attention of both streams, "attn2" the attention to the prompt."""

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"lora.{name}={getattr(self, name)!r}: expected at least 1")
        if not self.attention or set(self.attention) - {"attn1", "attn2"}:
            raise ValueError(f"lora.attention={self.attention!r}: expected some of 'attn1', 'attn2'")


def add_lora(model: UniViGUTransformer3DModel, options: LoraOptions) -> None:
    """Add adapters to the projections; they start at zero, so the model's output does not change."""
    from peft import LoraConfig

    layers = "|".join(options.attention)
    targets = rf".*\.({layers})\.(to_q|to_k|to_v|to_out\.0)"
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=targets, bias="none"))
    for name, parameter in model.named_parameters():  # peft has frozen everything else
        parameter.requires_grad_(gradients.get(name.replace(BASE, "."), True))
        if is_lora_parameter(name):  # also beside bfloat16 weights
            parameter.data = parameter.data.float()


def is_lora_parameter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


def merge_lora(state: Mapping[str, torch.Tensor], options: LoraOptions) -> dict[str, torch.Tensor]:
    """A state dict with the adapters' products added to the weights, in float32."""
    merged = {name: value for name, value in state.items() if not is_lora_parameter(name)}
    scale = options.alpha / options.rank
    for name in [name for name in state if name.endswith(DOWN)]:
        layer = name[: -len(DOWN)]
        weight = f"{layer}.base_layer.weight"
        added = scale * state[f"{layer}{UP}"].float() @ state[name].float()
        merged[weight] = (state[weight].float() + added).to(state[weight].dtype)
    return {name.replace(BASE, "."): value for name, value in merged.items()}


def lora_options(saved: Mapping[str, Any] | None) -> LoraOptions | None:
    """The options that a checkpoint has recorded."""
    return None if saved is None else LoraOptions(**{**saved, "attention": tuple(saved["attention"])})
