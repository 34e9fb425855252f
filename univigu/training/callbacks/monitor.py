"""What is told of a run: learning rates, gradient norm, throughput, the samples of an epoch, and lines of progress."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import TaskID
from torch.distributed.tensor import DTensor

from univigu.data.loader import TrainLoader, of_all_ranks
from univigu.data.progress import LineProgress
from univigu.training.stages import ends_step


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
        self._started, self._batches, self._samples, self._tokens = time.perf_counter(), 0, 0, 0
        self._waited = getattr(trainer.train_dataloader, "waited", None)

    on_validation_end = on_train_start  # validation is not part of the training time

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step % self.every_n_steps:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        pl_module.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
        for group in optimizer.param_groups:
            pl_module.log(f"lr/{group['name']}", group["lr"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batches += 1
        self._samples += len(batch["key"])
        self._tokens += len(batch["key"]) * pl_module.sample_tokens
        if self._batches < self.every_n_steps:
            return
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated(pl_module.device)
        elapsed = time.perf_counter() - self._started
        rates = {
            "samples_per_second": self._samples * trainer.world_size / elapsed,
            "tokens_per_second": self._tokens * trainer.world_size / elapsed,
            "seconds_per_batch": elapsed / self._batches,
            "memory_gb": memory / 1e9,
        }
        if self._waited is not None:
            rates["data_wait_share"] = (trainer.train_dataloader.waited - self._waited) / elapsed  # type: ignore[union-attr]
        pl_module.log_dict({f"throughput/{name}": value for name, value in rates.items()})
        self.on_train_start(trainer, pl_module)


class DataStatistics(Callback):
    """Logs at the end of every epoch its samples on all ranks, and counts of the samples that are left out.

    ``data/epoch/*``: numbers of samples, of those that were not new in the epoch, and of each source and bucket; an
    unreadable sample counts itself, not its replacement. ``data/filtered/*``: samples of the training split that the
    filters and the index leave out; ``data/unusable/*``: unusable samples of all splits so far.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.train_dataloader
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if not isinstance(loader, TrainLoader) or not done:
            return
        unusable = Counter(reason for _, _, reason in set().union(*of_all_ranks(loader.errors.seen)))
        if not trainer.is_global_zero:
            return
        refs = loader.samples(loader.position - done, loader.position)
        repeated = len(refs) - len({(ref.source, ref.shard, ref.key, ref.question) for ref in refs})
        counts = {"samples": len(refs), "repeated": repeated}
        num_sources = 1 + max(ref.source for ref in loader.dataset.refs)
        if num_sources > 1:
            sources = Counter(ref.source for ref in refs)
            counts |= {f"source_{number}": sources[number] for number in range(num_sources)}
        if len(loader.dataset.buckets) > 1:
            buckets = Counter(ref.bucket for ref in refs)
            counts |= {f"bucket_{bucket}": buckets[number] for number, bucket in enumerate(loader.dataset.buckets)}
        filtered = getattr(getattr(trainer, "datamodule", None), "filter_counts", {}).get("train", {})
        dropped = {name: count for name, count in filtered.items() if name != "kept"}
        groups = {"epoch": counts, "filtered": dropped, "unusable": unusable}
        metrics = {f"data/{group}/{name}": float(n) for group, part in groups.items() for name, n in part.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


class ProgressLines(Callback):
    """Prints a line every few seconds: step, stage, losses, clips a second, time left; in place of Lightning's bar."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.progress = LineProgress(seconds)
        self.progress.disable = True  # no bar, whatever standard error is

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._task: TaskID | None = None

    @rank_zero_only
    def _advance(
        self, trainer: Trainer, batch: Any, description: str, total: float, done: int = 0, batches: int = 1
    ) -> None:
        """Count a step (of some batches), or a batch; ``done`` were counted before the first."""
        if self._task is None:
            self._task = self.progress.add_task(description, total=total, completed=done)
        self.progress.update(self._task, description=description)
        clips = len(batch["key"] if "key" in batch else batch["index"]) * batches * trainer.world_size
        self.progress.advance(self._task, 1, trainer.progress_bar_metrics, clips)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if ends_step(trainer, batch_idx):
            done, batches = trainer.global_step - 1, trainer.accumulate_grad_batches
            self._advance(trainer, batch, f"fit {pl_module.stage_name}", trainer.max_steps, done, batches)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "validate":  # not within fit
            self._advance(trainer, args[2], "validate", sum(trainer.num_val_batches))

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._advance(trainer, args[2], "test", sum(trainer.num_test_batches))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self._advance(trainer, args[1], f"predict {pl_module.predict_task}", sum(trainer.num_predict_batches))
