"""Scalars about the training itself: learning rates, gradient norm, throughput."""

from __future__ import annotations

import resource
import sys
import time
from math import prod
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from univigu.flow.objective import num_positions
from univigu.training.module import UniViGU


class TrainingMonitor(Callback):
    """Logs learning rates, the gradient norm before clipping, and ``throughput/*``.

    ``samples_per_second`` and ``tokens_per_second`` (video and text) of all processes; ``seconds_per_batch``;
    ``memory_gb``: peak of the GPU's allocator, else of resident memory; ``data_wait_share``: share of the time spent
    waiting for batches, if the loader measures it (see ``univigu.data.loader.TrainLoader``).

    Args:
        every_n_steps: how often, in batches; throughput is averaged over the interval.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: expected at least 1")
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)  # validation is not part of the training time

    def _begin(self, trainer: Trainer) -> None:
        self._started, self._batches, self._samples, self._tokens = time.perf_counter(), 0, 0, 0
        self._waited = getattr(trainer.train_dataloader, "waited", None)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step % self.every_n_steps:
            return
        norms = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if norms:
            norm = torch.stack(norms).norm()
            pl_module.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
        for group in optimizer.param_groups:
            pl_module.log(f"lr/{group['name']}", group["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, UniViGU)
        self._batches += 1
        self._samples += len(batch["key"])
        self._tokens += len(batch["key"]) * _tokens(pl_module, batch)
        if self._batches < self.every_n_steps:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - self._started
        rates = {
            "samples_per_second": self._samples * trainer.world_size / elapsed,
            "tokens_per_second": self._tokens * trainer.world_size / elapsed,
            "seconds_per_batch": elapsed / self._batches,
            "memory_gb": _memory_bytes(pl_module.device) / 1e9,
        }
        if self._waited is not None:
            rates["data_wait_share"] = (trainer.train_dataloader.waited - self._waited) / elapsed  # type: ignore[union-attr]
        pl_module.log_dict({f"throughput/{name}": value for name, value in rates.items()})
        self._begin(trainer)


def _tokens(module: UniViGU, batch: Any) -> int:
    """Tokens of a sample in a training step, of video and text."""
    tasks, stage = module.tasks, module.stage
    if "latents" in batch:
        shape = batch["latents"].shape[1:]
    else:
        frames, _, height, width = batch["video"].shape[1:]
        shape = tasks.latents_shape(height, width, frames)
    video = prod(n // p for n, p in zip(shape[1:], tasks.transformer.config.patch_size, strict=True))
    return video + num_positions(stage.text_length, stage.text_share_at(module.stage_step))


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
