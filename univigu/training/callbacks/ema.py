"""A running mean of the weights, of sharded models too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.tensor import DTensor

from univigu.training.parallel import reshard
from univigu.training.stages import ends_step


class WeightEMA(Callback):
    """Keeps a running mean of the weights: ``mean = d * mean + (1 - d) * weight`` after every step.

    Validation and what is saved for use see the mean. Each process averages its own share in float32 (Lightning's
    ``EMAWeightAveraging`` copies the module before it is sharded); the means are saved and resharded as weights are.

    Args:
        decay: d, in [0, 1); 0.999 averages over about the last thousand steps.
        warmup: follow faster at first, with decay (1 + step) / (10 + step) until that reaches d.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay!r}: expected a number in [0, 1)")
        self.decay, self.warmup = decay, warmup

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning restores a whole model before on_fit_start, and a sharded one after it.
        if stage == "fit" and pl_module.device_mesh is None:
            pl_module.configure_model()
            self.on_fit_start(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        # Part of the module's state dict under this name, see checkpoint.EMA_PREFIX. A resumed run loads its means.
        if not hasattr(pl_module, "ema"):
            reshard(pl_module.transformer)
            pl_module.ema = _means(pl_module.transformer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        for mean, weight in _pairs(pl_module):
            mean.lerp_(weight.to(mean.dtype), 1.0 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if hasattr(pl_module, "ema"):
            for mean, weight in _pairs(pl_module):
                trained = weight.clone()
                weight.copy_(mean)
                mean.copy_(trained)

    on_validation_end = on_validation_start  # swaps them back

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        for mean, weight in _pairs(pl_module):
            weight.copy_(mean)


def _means(module: nn.Module) -> nn.Module:
    """Float32 copies of a module's parameters, under the same names."""
    means = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        copy = parameter.detach().to(torch.float32, copy=True)
        means.register_parameter(name, nn.Parameter(copy, requires_grad=False))
    for name, child in module.named_children():
        means.add_module(name, _means(child))
    return means


def _pairs(pl_module: Any) -> Iterator[list[torch.Tensor]]:
    """Each mean with its weight, without their gradients; local shares of sharded ones."""
    reshard(pl_module.transformer)
    for name, mean in pl_module.ema.named_parameters():
        pair = (mean.detach(), pl_module.transformer.get_parameter(name).detach())
        yield [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in pair]
