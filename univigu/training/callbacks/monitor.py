"""Scalars about the training itself: learning rates, gradient norm, throughput."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from univigu.training.module import UniViGU
from univigu.training.parallel import ShardedStrategy
from univigu.training.plan import Workload, step_flops


class TrainingMonitor(Callback):
    """Logs learning rates, the gradient norm before clipping, and ``throughput/*``.

    ``samples_per_second`` and ``tokens_per_second`` (video and text) of all processes; ``seconds_per_batch``;
    ``memory_gb``: peak of the GPU's allocator, else of resident memory; ``data_wait_share``: share of the time spent
    waiting for batches, if the loader measures it (see :class:`univigu.data.loader.TrainLoader`); ``utilisation``: a
    step's operations without recomputation (see :mod:`univigu.training.plan`) relative to ``peak_flops``.

    Args:
        every_n_steps: how often, in batches; throughput is averaged over the interval.
        peak_flops: operations a second of one device; None logs no utilisation.
    """

    def __init__(self, every_n_steps: int = 20, peak_flops: float | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: expected at least 1")
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops={peak_flops}: expected a number over 0")
        self.every_n_steps, self.peak_flops = every_n_steps, peak_flops
        self._flops_of: dict[str, float] = {}  # by workload

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)  # validation is not part of the training time

    def _begin(self, trainer: Trainer) -> None:
        self._started, self._batches, self._samples, self._tokens, self._flops = time.perf_counter(), 0, 0, 0, 0.0
        self._waited = getattr(trainer.train_dataloader, "waited", None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, UniViGU)
        self._workload = workload(trainer, pl_module, batch)
        if self.peak_flops is not None and repr(self._workload) not in self._flops_of:
            self._flops_of[repr(self._workload)] = step_flops(self._workload, checkpointing=False)
            self._begin(trainer)  # counting takes seconds

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
            pl_module.log(f"lr/{group['name']}{'_muon' if 'momentum' in group else ''}", group["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        work = self._workload
        self._batches += 1
        self._samples += work.batch_size
        self._tokens += work.batch_size * (work.video_tokens + work.text_tokens)
        self._flops += self._flops_of.get(repr(work), 0.0)
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
        if self.peak_flops is not None:
            rates["utilisation"] = self._flops / (elapsed * self.peak_flops)
        pl_module.log_dict({f"throughput/{name}": value for name, value in rates.items()})
        self._begin(trainer)


def workload(trainer: Trainer, pl_module: UniViGU, batch: Any) -> Workload:
    """What a training step on a batch computes."""
    assert pl_module.transformer is not None
    if "latents" in batch:
        latents = tuple(batch["latents"].shape[1:])
    else:
        frames, _, height, width = batch["video"].shape[1:]
        latents = pl_module.tasks.latents_shape(height, width, frames)
    strategy = trainer.strategy
    return Workload(
        {name: value for name, value in pl_module.transformer.config.items() if not name.startswith("_")},
        latents,
        batch["prompt_ids"].shape[1],
        pl_module.stage,
        batch_size=len(batch["key"]),
        lora=pl_module.lora,
        optimizer=pl_module.optimizer_options,
        compute_dtype=strategy.compute_dtype if isinstance(strategy, ShardedStrategy) else torch.float32,
        text_share=pl_module.text_share,
    )


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
