"""Scalars about the training itself: learning rates, gradient norm, throughput."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from univigu.training.callbacks.wait import DataWait


class TrainingMonitor(Callback):
    """Logs learning rates, the gradient norm before clipping, samples a second, and the share spent on data.

    Args:
        every_n_steps: how often, in optimizer steps; throughput is averaged over the interval.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: expected at least 1")
        self.every_n_steps = every_n_steps
        self._samples = 0
        self._started = 0.0
        self._wait = DataWait()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self._started, self._samples = time.perf_counter(), 0
        self._wait.start(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)  # its time is no training's

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._wait.batch_started()

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
            muon = "_muon" if "momentum" in group else ""
            pl_module.log(f"lr/{group['name']}{muon}", group["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch["key"]) * trainer.world_size
        self._wait.batch_ended()
        if (batch_idx + 1) % self.every_n_steps:
            return
        elapsed = time.perf_counter() - self._started
        pl_module.log("throughput/samples_per_second", self._samples / elapsed)
        pl_module.log("throughput/data_wait_share", self._wait.take(trainer) / elapsed)
        self._begin(trainer)
