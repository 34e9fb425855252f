"""A running mean of the weights, of sharded models too."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.tensor import DTensor

from univigu.training.parallel import reshard


class WeightEMA(Callback):
    r"""Keeps :math:`\bar\theta \leftarrow d \bar\theta + (1 - d) \theta` of what is trained, after every step.

    Validation and the model loaded from a checkpoint use the mean. Lightning's ``EMAWeightAveraging`` copies the module
    before it is sharded; here each process averages its own shard in float32.

    Args:
        decay: d, in [0, 1); 0.999 averages over the last thousand steps or so.
        warmup: let the mean follow faster at first, with decay (1 + step) / (10 + step) until that reaches d.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay!r}: expected a number in [0, 1)")
        self.decay = decay
        self.warmup = warmup
        self._updated = 0

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
        """From the weights as they are; a checkpoint that is resumed brings its own means."""
        # Under this name they are part of the module's state dict; see checkpoint.usable_weights.
        pl_module.ema = _Means(pl_module.transformer)  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step <= self._updated:  # gradients are still being accumulated
            return
        self._updated = step
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        pl_module.ema.update(pl_module.transformer, decay)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if hasattr(pl_module, "ema"):
            pl_module.ema.swap(pl_module.transformer)

    on_validation_end = on_validation_start  # swaps back

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The mean is the result of training."""
        pl_module.ema.copy_to(pl_module.transformer)

    def state_dict(self) -> dict[str, Any]:
        return {"updated": self._updated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updated = state_dict["updated"]


class _Means(nn.Module):
    """Means of a model's parameters, named as they are; local shares of sharded ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        reshard(model)
        for name, parameter in model.named_parameters():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:  # nested modules, for the same names
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, nn.Parameter(parameter.detach().clone(), requires_grad=False))

    def _pairs(self, model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each mean with its weight."""
        reshard(model)
        weights = dict(model.named_parameters())
        return [(_local(mean), _local(weights[name])) for name, mean in self.named_parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Move the means by ``1 - decay`` of the way to the model's weights."""
        means, weights = zip(*self._pairs(model), strict=True)
        torch._foreach_lerp_(means, weights, 1.0 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange means and weights."""
        for mean, weight in self._pairs(model):
            kept = mean.clone()
            mean.copy_(weight)
            weight.copy_(kept)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the model the means."""
        for mean, weight in self._pairs(model):
            weight.copy_(mean)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
