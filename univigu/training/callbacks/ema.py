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
            self._start(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(pl_module, "ema"):
            self._start(pl_module)

    @staticmethod
    def _start(pl_module: LightningModule) -> None:
        # Part of the module's state dict under this name, see checkpoint.EMA_PREFIX. A resumed run loads its means.
        pl_module.ema = _Means(pl_module.transformer)  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        for mean, weight in pl_module.ema.pairs(pl_module.transformer):
            mean.lerp_(weight.to(mean.dtype), 1.0 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if hasattr(pl_module, "ema"):
            for mean, weight in pl_module.ema.pairs(pl_module.transformer):
                trained = weight.clone()
                weight.copy_(mean)
                mean.copy_(trained)

    on_validation_end = on_validation_start  # swaps them back

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        for mean, weight in pl_module.ema.pairs(pl_module.transformer):
            weight.copy_(mean)


class _Means(nn.Module):
    """Means of a model's parameters, with the same names; local shares of sharded ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        reshard(model)
        for name, parameter in model.named_parameters():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:  # modules within modules, for the names
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            mean = parameter.detach().to(torch.float32, copy=True)
            owner.register_parameter(last, nn.Parameter(mean, requires_grad=False))

    def pairs(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each mean with the model's weight, without their gradients."""
        reshard(model)
        weights = dict(model.named_parameters())
        for name, mean in self.named_parameters():
            pair = (mean.detach(), weights[name].detach())
            local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in pair]
            yield local[0], local[1]
