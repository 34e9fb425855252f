"""How fast training is, and how much of the machine it uses."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import Throughput, get_available_flops

from univigu.training.callbacks.wait import DataWait
from univigu.training.module import UniViGU
from univigu.training.parallel import ShardedStrategy
from univigu.training.plan import Workload, step_flops
from univigu.training.stages import Stage


class ThroughputLogger(Callback):
    """Logs ``speed/*``: clips and tokens a second of all processes, utilisation, memory, and the share spent waiting.

    ``speed/clips_per_second``, ``speed/tokens_per_second`` (video and text), ``speed/seconds_per_step``;
    ``speed/utilisation``: the step's operations, counted on the meta device without what is computed again, over what
    the device could do in the time; ``speed/memory_gb``: the most that was allocated, on a GPU by its allocator, else
    resident; ``speed/data_wait_share``: of the time, waiting for the next batch.

    Lightning's ``ThroughputMonitor`` knows neither the wait nor the memory and takes the device's peak from the
    trainer's precision, which is not what a sharded model computes in; its window arithmetic is what is used here.

    Args:
        every_n_steps: how often, in batches; also the window that is averaged over.
        peak_flops: operations a second of one device; None looks the device up, and leaves utilisation out where it
            is not known (as on a CPU).
    """

    def __init__(self, every_n_steps: int = 20, peak_flops: float | None = None) -> None:
        if every_n_steps < 2:
            raise ValueError(f"every_n_steps={every_n_steps}: expected at least 2")
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops={peak_flops}: expected a number over 0")
        self.every_n_steps = every_n_steps
        self.peak_flops = peak_flops
        self._stage: Stage | None = None
        self._wait = DataWait()
        self._costs: dict[tuple[float, ...], tuple[float | None, int]] = {}
        """Operations (where they are counted) and tokens of a clip, by the share of its text and its size."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting anew: at the start, at another stage, and after what is no training."""
        peak = self.peak_flops
        if peak is None and pl_module.device.type == "cuda":
            peak = get_available_flops(pl_module.device, compute_dtype(pl_module, trainer))
        self._window = Throughput(peak, trainer.world_size, window_size=self.every_n_steps, separator="_")
        self._started = self._ended = self._marked = time.perf_counter()
        self._batches = self._samples = self._tokens = 0
        self._wait.start(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._wait.batch_started()
        if pl_module.stage is not self._stage:
            self._stage, self._costs = pl_module.stage, {}
        size = (pl_module.text_share, *batch["latents" if "latents" in batch else "video"].shape[1:])
        if size not in self._costs:  # once a stage, share of the text and, where clips are of several sizes, bucket
            work = workload(trainer, pl_module, batch)
            checked = self._window.available_flops is not None  # counting takes seconds: only where it is used
            flops = step_flops(work, checkpointing=False) / work.batch_size if checked else None
            self._costs[size] = flops, work.video_tokens + work.text_tokens
            self._begin(trainer, pl_module)
        self._flops_each, self._tokens_each = self._costs[size]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        size = len(batch["key"])
        self._ended = time.perf_counter()
        self._wait.batch_ended()
        self._batches, self._samples = self._batches + 1, self._samples + size
        self._tokens += size * self._tokens_each
        self._window.update(
            time=self._ended - self._started, batches=self._batches, samples=self._samples, lengths=self._tokens,
            flops=None if self._flops_each is None else round(self._flops_each * size),
        )  # fmt: skip
        if self._batches % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        numbers, world = self._window.compute(), trainer.world_size
        rates = {
            "clips_per_second": numbers["device_samples_per_sec"] * world,
            "tokens_per_second": numbers["device_items_per_sec"] * world,
            "seconds_per_step": 1.0 / numbers["device_batches_per_sec"],
            "memory_gb": memory_bytes(pl_module.device) / 1e9,
            "data_wait_share": self._wait.take(trainer) / (self._ended - self._marked),
        }
        if "device_mfu" in numbers:
            rates["utilisation"] = numbers["device_mfu"]
        self._marked = self._ended
        pl_module.log_dict({f"speed/{name}": float(value) for name, value in rates.items()})


def compute_dtype(pl_module: LightningModule, trainer: Trainer) -> torch.dtype:
    """What the transformer computes in."""
    if isinstance(trainer.strategy, ShardedStrategy):
        return trainer.strategy.compute_dtype
    return torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32


def workload(trainer: Trainer, pl_module: UniViGU, batch: Any) -> Workload:
    """What the steps of the present stage compute."""
    assert pl_module.transformer is not None
    config = pl_module.transformer.config
    if "latents" in batch:
        latents = tuple(batch["latents"].shape[1:])
    else:
        frames, _, height, width = batch["video"].shape[1:]
        latents = pl_module.tasks.latents_shape(height, width, frames)
    return Workload(
        {name: value for name, value in config.items() if not name.startswith("_")},
        latents,
        batch["prompt_ids"].shape[1],
        pl_module.stage,
        batch_size=len(batch["key"]),
        lora=pl_module.lora,
        flow=pl_module.flow,
        optimizer=pl_module.optimizer_options,
        compute_dtype=compute_dtype(pl_module, trainer),
        text_share=pl_module.text_share,
    )


def memory_bytes(device: torch.device) -> int:
    """The most that this process has held: by a GPU's allocator, or resident in the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
