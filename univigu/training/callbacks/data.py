"""What each epoch was made of."""

from __future__ import annotations

from collections import Counter

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from univigu.data.datamodule import VideoTextDataModule
from univigu.data.loader import TrainLoader
from univigu.data.shards import SampleRef


class DataStatistics(Callback):
    """Logs at the end of every epoch what it held, on all ranks together, and what is left out of the data.

    ``data/epoch/prompt_tokens``, ``caption_tokens``: histograms of the texts' lengths, in TensorBoard, and so is
    ``data/epoch/buckets`` (numbers of ``data.buckets``) where there are several; ``data/epoch/samples`` and
    ``repeated``: how many were taken, and how many of these not for the first time in the epoch; ``source_0``, ... and
    ``bucket_480x832x81``, ...: how many of each, where there are several; ``data/filtered/*``: samples of the training
    split that the filters and the index leave out, by reason; ``data/unusable/*``: samples of all splits that could
    not be used so far, by reason.

    It needs no state: what an epoch holds follows from the loader's position, after a resume in mid-epoch too.  An
    unreadable sample counts in its own place, not by the one that took it.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader, data = trainer.train_dataloader, trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(loader, TrainLoader) or not isinstance(data, VideoTextDataModule):
            raise MisconfigurationException("DataStatistics: the data are not a VideoTextDataModule's")
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if not done or not trainer.is_global_zero:
            return
        refs = loader.samples(loader.position - done, loader.position)
        metrics = {f"data/epoch/{name}": float(count) for name, count in epoch_counts(refs, data).items()}
        dropped = {name: count for name, count in data.filter_counts["train"].items() if name != "kept"}
        for group, counts in (("filtered", dropped), ("unusable", data.errors.counts)):
            metrics |= {f"data/{group}/{reason}": float(count) for reason, count in counts.items()}
        histograms = {f"{name}_tokens": [ref.tokens[i] for ref in refs] for i, name in enumerate(("prompt", "caption"))}
        if len(data.buckets) > 1:
            histograms["buckets"] = [ref.bucket for ref in refs]
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                for name, values in histograms.items():
                    logger.experiment.add_histogram(f"data/epoch/{name}", torch.tensor(values), trainer.global_step)


def epoch_counts(refs: list[SampleRef], data: VideoTextDataModule) -> dict[str, int]:
    """How many samples there are, how many repeated ones, and how many of each source and bucket."""
    distinct = {(ref.source, ref.shard, ref.key, ref.question) for ref in refs}
    sources, buckets = Counter(ref.source for ref in refs), Counter(ref.bucket for ref in refs)
    counts = {"samples": len(refs), "repeated": len(refs) - len(distinct)}
    if len(data.sources or ()) > 1:
        counts |= {f"source_{number}": sources[number] for number in range(len(data.sources or ()))}
    if len(data.buckets) > 1:
        counts |= {f"bucket_{bucket}": buckets[number] for number, bucket in enumerate(data.buckets)}
    return counts
