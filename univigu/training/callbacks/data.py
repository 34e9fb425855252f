"""Statistics of the samples of each epoch."""

from __future__ import annotations

from collections import Counter

from lightning import Callback, LightningModule, Trainer

from univigu.data.loader import TrainLoader


class DataStatistics(Callback):
    """Logs at the end of every epoch its samples on all ranks, and counts of the samples that are left out.

    ``data/epoch/*``: numbers of samples, of those that were not new in the epoch, and of each source and bucket.
    ``data/filtered/*``: samples of the training split that the filters and the index leave out; ``data/unusable/*``:
    unusable samples of all splits so far.

    It needs no state: the samples of an epoch follow from the loader's position. An unreadable sample counts itself,
    not its replacement. With loaders of another kind nothing is logged.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.train_dataloader
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if not isinstance(loader, TrainLoader) or not done or not trainer.is_global_zero:
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
        groups = {"epoch": counts, "filtered": dropped, "unusable": loader.errors.counts}
        metrics = {f"data/{group}/{name}": float(n) for group, part in groups.items() for name, n in part.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
