"""The LightningDataModule: prepares shards, selects samples, and makes the loaders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from univigu.data.buckets import Bucket, BucketChooser, Grid
from univigu.data.build import SpawnPool, this_device
from univigu.data.filters import LengthFilter, Selection, select
from univigu.data.inputs import PromptInputs, VideoInputs, find_videos, read_prompts
from univigu.data.loader import ErrorLog, SampleLoader, TrainLoader, VideoTextDataset
from univigu.data.order import EvalOrder, TrainOrder
from univigu.data.pairs import PairInputs, TextField, check_strength, read_pairs
from univigu.data.resources import encoding_processes, warn_if_slow
from univigu.data.sample import LATENTS_SUFFIX, DataError
from univigu.data.shards import SampleRef
from univigu.data.sources import LatentsOptions, Place, Source, Split, weights_of
from univigu.models.foundation import EMBEDDED_FOUNDATION
from univigu.shapes.write import world_fingerprint, write_shapes
from univigu.training.prediction import INPUTS, PredictTask

log = logging.getLogger(__name__)

SPLITS: dict[str, tuple[Split, ...]] = {
    TrainerFn.FITTING: ("train", "val"),
    TrainerFn.VALIDATING: ("val",),
    TrainerFn.TESTING: ("test",),
    TrainerFn.PREDICTING: (),
}


class VideoTextDataModule(LightningDataModule):
    """Videos with a brief prompt and a detailed caption, from shards; and the inputs of prediction.

    Args:
        foundation: WanPipeline folder that gives the tokenizer, and the VAE for precomputation.
        root: where the embedded world is written when ``shards`` is not given, and remote shards are copied to.
        shards: folder or URL with train/, val/ and test/ folders of shards; in a folder also plain videos with their
            texts, or train.csv and so on (docs/DATA.md).  None takes the embedded world.
        sources: several of these in place of ``shards``, with weights that say how often training draws from each;
            validation and test take every sample of the sources that have such a folder, once.
        num_train_clips: size of the embedded world's training split.
        num_val_clips: size of its validation split.
        num_test_clips: size of its test split.
        batch_size: samples a batch and device.
        num_workers: processes that load; 0 loads in the training process.
        height: of the videos in pixels.
        width: of the videos in pixels.
        num_frames: frames a video, 4k+1 for Wan's VAE.
        buckets: several sizes in place of the one above: each clip is brought to the one that keeps most of it, and a
            batch holds clips of one.  The size above stays that of what prediction makes.
        prompt_length: slot of the prompt in tokens, its end-of-sequence token counted.
        caption_length: slot of the caption in tokens, its end-of-sequence token counted.
        length_filter: which lengths of texts are trained and evaluated on.
        precompute: encode videos and prompts once, into a folder beside the shards; False encodes them on the fly.
        strict: raise on the first sample that cannot be used instead of skipping it.
        texts: "caption" trains on prompt and caption; "qa" on each of a sample's questions as the prompt and its answer
            as the caption (with ``length_filter`` for short answers).
        seed: seeds the order of the training samples.
        videos: what ``lightning predict`` captions: a video file, a folder, a glob pattern, or a list of these.
        prompts: what ``lightning predict`` generates from: a prompt, a .txt, .jsonl or .parquet file, or a list of
            prompts.
        pairs: what ``lightning predict`` edits or answers: a .jsonl or .csv file of ``{video, prompt, strength}`` or
            ``{video, question}``, or such objects themselves; see :func:`univigu.data.pairs.read_pairs`.
        strength: of edits that name none: how far back towards noise they start, in (0, 1].
        predict_task: what ``lightning predict`` makes; the model's.
    """

    def __init__(
        self,
        foundation: str = EMBEDDED_FOUNDATION,
        root: str = "runs/data/shapes",
        shards: str | None = None,
        sources: list[Source] | None = None,
        num_train_clips: int = 4000,
        num_val_clips: int = 200,
        num_test_clips: int = 200,
        batch_size: int = 16,
        num_workers: int = 1,
        height: int = 64,
        width: int = 64,
        num_frames: int = 9,
        buckets: list[Bucket] | None = None,
        prompt_length: int = 128,
        caption_length: int = 256,
        length_filter: LengthFilter = LengthFilter(),  # noqa: B008
        precompute: bool = True,
        strict: bool = False,
        texts: Literal["caption", "qa"] = "caption",
        seed: int = 0,
        videos: str | list[str] | None = None,
        prompts: str | list[str] | None = None,
        pairs: dict[str, Any] | list[dict[str, Any]] | str | None = None,
        strength: float = 0.8,
        predict_task: PredictTask | None = None,
    ) -> None:
        super().__init__()
        self.foundation, self.root, self.shards, self.sources = foundation, root, shards, sources
        self.num_clips: dict[Split, int] = {"train": num_train_clips, "val": num_val_clips, "test": num_test_clips}
        self.batch_size, self.num_workers = batch_size, num_workers
        self.height, self.width, self.num_frames = height, width, num_frames
        self.prompt_length, self.caption_length = prompt_length, caption_length
        self.length_filter = length_filter
        self.precompute, self.strict, self.seed = precompute, strict, seed
        self.texts = texts
        self.weights = None if sources is None else weights_of(sources)
        self.videos, self.prompts, self.pairs = videos, prompts, pairs
        self.strength, self.predict_task = strength, predict_task
        self.filter_counts: dict[str, dict[str, int]] = {}
        """By split: how many samples are "kept", and how many are not by reason.  Known after ``setup``."""
        self.errors = ErrorLog(strict)
        """What the loaders met since: samples that could not be read, counted by reason."""
        self.text_lengths: dict[str, dict[str, list[int]]] = {}
        """By split: tokens of the kept samples' prompts and captions, their closing token counted."""
        self.group_counts: dict[str, dict[str, int]] = {}
        """By split: kept samples of each source and bucket, where there are several."""
        self._refs: dict[Split, list[SampleRef]] = {}
        self._inputs: VideoInputs | PromptInputs | None = None
        self._tokenizer: Any = None
        self._check_arguments()
        for bucket in buckets or ():
            if (buckets or []).count(bucket) > 1:
                raise ValueError(f"data.buckets={list(map(str, buckets or ()))}: {bucket} is there twice")
        self.buckets = buckets or [Bucket(height, width, num_frames)]
        """The sizes that videos are brought to."""

    def _check_arguments(self) -> None:
        least = {"batch_size": 1, "num_workers": 0, "height": 2, "width": 2, "num_frames": 1, "prompt_length": 1}
        for name, bound in (least | {"caption_length": 1}).items():
            if getattr(self, name) < bound:
                raise ValueError(f"data.{name}={getattr(self, name)}: expected at least {bound}")
        for split, count in self.num_clips.items():
            if count < 1:
                raise ValueError(f"data.num_{split}_clips={count}: expected at least 1")
        if self.shards is not None and self.sources is not None:
            raise ValueError("data.shards and data.sources: both are given, expected one of them")
        check_strength(self.strength, "data")

    # --------------------------------------------------------------- preparing

    def _splits(self) -> tuple[Split, ...]:
        """The splits that the trainer's current task needs; all of them without a trainer."""
        if self.trainer is None or self.trainer.state.fn is None:
            return ("train", "val", "test")
        return SPLITS[self.trainer.state.fn]

    def prepare_data(self) -> None:
        """Write the embedded world and encode the shards, where that has not been done yet (one process a node)."""
        splits = self._splits()
        if not splits:
            return
        self._check_size()
        places = self._places()
        for place in places:
            for split in splits:
                place.fetch(split, optional=split != "train" and len(places) > 1)
        device = self._encoding_device()
        with SpawnPool() as pool, SpawnPool(encoding_processes(self.foundation, device)) as fewer:
            if self.shards is None and self.sources is None:
                size = {"height": self.height, "width": self.width, "num_frames": self.num_frames}
                for split in splits:
                    write_shapes(places[0].videos(split), split, self.num_clips[split], pool=pool, **size)
            having = [(place, split) for split in splits for _, place in self._having(split)]
            for place, split in having if self.precompute else ():
                place.check(split)
            if not all(place.is_ready(split) for place, split in having):
                warn_if_slow(self.foundation, device)
            encoders = pool if device == "cpu" and fewer.workers == pool.workers else fewer
            for place, split in having:
                place.encode(split, self.strict, encoders, device)

    def _encoding_device(self) -> str:
        """The GPU that training takes, or else the CPU; without a trainer this process's GPU, if there is one."""
        if self.trainer is None:
            return this_device()
        device = self.trainer.strategy.root_device
        return str(device) if device.type == "cuda" else "cpu"

    def _places(self) -> list[Place]:
        """Where the shards of each source lie."""
        latents = LatentsOptions(self.foundation, tuple(self.buckets), self.precompute)
        if self.shards is not None or self.sources is not None:
            names = [source.shards for source in self.sources or ()] or [str(self.shards)]
            return [Place.of(name, self.root, latents) for name in names]
        # Other clips go to another folder: nothing is overwritten that a running training reads.
        sizes = (self.height, self.width, self.num_frames), tuple(self.num_clips.values())
        name = "-".join(["x".join(map(str, part)) for part in sizes] + [world_fingerprint()])
        return [Place(Path(self.root) / name, latents)]

    def _having(self, split: Split) -> list[tuple[int, Place]]:
        """The sources that take part in a split, with their numbers: all in training, else those that have it."""
        places = list(enumerate(self._places()))
        if split == "train" or len(places) == 1:
            return places
        having = [(number, place) for number, place in places if place.has(split)]
        if not having:
            raise DataError(f"data.sources: none of {[str(place.base) for _, place in places]} holds a {split} folder")
        return having

    def _check_size(self) -> list[tuple[int, int, int]]:
        """Each bucket's latents' (T, H, W); raises DataError for a size that is not made of whole tokens."""
        grid = self._check_own_size()
        for number, bucket in enumerate(self.buckets):
            grid.check(bucket, f"data.buckets[{number}].{{}}".format)
        return [grid.latents_shape(bucket) for bucket in self.buckets]

    def _check_own_size(self) -> Grid:
        """The same of the size that prediction makes videos of, or brings those to that it reads."""
        grid = Grid.of(self.foundation)
        grid.check(Bucket(self.height, self.width, self.num_frames), "data.{}".format)
        return grid

    # ------------------------------------------------------------------- setup

    def setup(self, stage: str) -> None:
        """Index the shards and select samples ("fit", "validate", "test"), or find the inputs ("predict").

        Raises:
            DataError: nothing is left of a split, the latents belong to another VAE, or an input names nothing.
            SampleError: in strict mode, for the first sample that cannot be used.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the workers' fork
        if stage == TrainerFn.PREDICTING:
            self._inputs = self._find_inputs()
            self._check_own_size()
            return
        for split in SPLITS[stage]:
            if split not in self._refs:
                self._refs[split] = self._select(split)
        self._log_counts()

    @property
    def tokenizer(self) -> Any:
        """The foundation's tokenizer."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            folder = Path(self.foundation) / "tokenizer"
            if not folder.is_dir():
                raise DataError(f"foundation={self.foundation!r}: it holds no tokenizer folder")
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        return self._tokenizer

    def _select(self, split: Split) -> list[SampleRef]:
        kept: list[SampleRef] = []
        counts: Counter[str] = Counter(kept=0)
        self.text_lengths[split] = {"prompt": [], "caption": []}
        for number, place in self._having(split):
            selection = self._select_from(place, split)
            kept += [replace(ref, source=number) for ref in selection.kept]
            counts += selection.counts
            for name, lengths in selection.lengths.items():
                self.text_lengths[split][name] += lengths
        self.filter_counts[split] = dict(sorted(counts.items(), key=lambda item: (item[0] != "kept", item)))
        self.group_counts[split] = self._group_counts(kept)
        if self.group_counts[split]:
            log.info("%s: %s", split, self.group_counts[split])
        return kept

    def _select_from(self, place: Place, split: Split) -> Selection:
        """The samples of one source, and why the rest of it is left out."""
        shapes = self._check_size()
        refs, errors = place.index(split)
        slots = self.prompt_length, self.caption_length
        selection = select(
            refs, self.tokenizer, self.length_filter, *slots, questions=self.texts == "qa",
            bucket_of=BucketChooser(self.buckets, shapes),
        )  # fmt: skip
        self.errors.add(errors + selection.errors)
        selection.counts += Counter(error.reason for error in errors)
        counts = {"kept": len(selection.kept), **dict(sorted(selection.counts.items()))}
        log.info("%s: %s", place.folder(split), counts)
        if not selection.kept:
            raise DataError(f"{place.folder(split)}: no sample is left for {split}: {counts}")
        return selection

    def _group_counts(self, refs: list[SampleRef]) -> dict[str, int]:
        counts: dict[str, int] = {}
        if len(self.sources or ()) > 1:
            counts |= {f"source_{i}": sum(ref.source == i for ref in refs) for i in range(len(self.sources or ()))}
        if len(self.buckets) > 1:
            counts |= {f"bucket_{b}": sum(ref.bucket == i for ref in refs) for i, b in enumerate(self.buckets)}
        return counts

    def _log_counts(self) -> None:
        if self.trainer is None or not self.trainer.is_global_zero:
            return
        splits = [*self.filter_counts.items(), *self.group_counts.items()]
        metrics = {f"data/{split}/{name}": float(n) for split, counts in splits for name, n in counts.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=0)
            if not isinstance(logger, TensorBoardLogger):
                continue
            for split, lengths in self.text_lengths.items():
                for name, values in lengths.items():
                    if values:
                        logger.experiment.add_histogram(f"data/{split}/{name}_tokens", torch.tensor(values), 0)

    def _find_inputs(self) -> VideoInputs | PromptInputs:
        given = [name for name in ("videos", "prompts", "pairs") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) + " are" if given else "none is"
            raise DataError(f"data.videos, data.prompts, data.pairs: prediction needs one of them, {found} given")
        if self.predict_task is not None and given[0] != INPUTS[self.predict_task]:
            needed = INPUTS[self.predict_task]
            raise DataError(f"model.predict_task={self.predict_task!r} needs data.{needed}, not data.{given[0]}")
        size = self.num_frames, self.height, self.width
        if self.videos is not None:
            return VideoInputs(find_videos(self.videos), *size)
        if self.pairs is not None:
            field: TextField = "question" if self.predict_task == "qa" else "prompt"
            return PairInputs(
                read_pairs(self.pairs, field, self.strength), *size, self.tokenizer, self.prompt_length
            )  # fmt: skip
        assert self.prompts is not None
        return PromptInputs(read_prompts(self.prompts), self.tokenizer, self.prompt_length)

    # ----------------------------------------------------------------- loaders

    def _ranks(self) -> dict[str, int]:
        """Which share of the batches this process gets; with tensor parallelism several processes get the same."""
        if self.trainer is None or self.trainer.world_size == 1:
            return {"rank": 0, "world_size": 1}
        kwargs = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
        if kwargs is None:
            return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        return {"rank": kwargs["rank"], "world_size": kwargs["num_replicas"]}

    def _dataset(self, split: Split, refs: list[SampleRef]) -> VideoTextDataset:
        return VideoTextDataset(
            refs,
            self.tokenizer,
            self.prompt_length,
            self.caption_length,
            buckets=self.buckets,
            latents_shapes=self._check_size(),
            replace=split == "train",
        )

    def _worker_options(self, refs: list[SampleRef]) -> dict[str, Any]:
        decodes = any(LATENTS_SUFFIX not in ref.members for ref in refs)
        return {"num_workers": self.num_workers, "spawn": decodes}

    def train_dataloader(self) -> TrainLoader:
        """Shuffled full batches; its position is saved in checkpoints and restored."""
        refs, ranks = self._refs["train"], self._ranks()
        order = self._train_order(refs, self.weights, **ranks)
        amount: int | float = getattr(self.trainer, "overfit_batches", 0)
        if amount > 0:
            wanted = amount if isinstance(amount, int) else max(1, int(amount * len(order)))
            refs = self._first_batches(refs, wanted, order)
            order = self._train_order(refs, None, **ranks)
        return TrainLoader(self._dataset("train", refs), order, self.errors, **self._worker_options(refs))

    def _train_order(self, refs: list[SampleRef], weights: list[float] | None, **ranks: int) -> TrainOrder:
        buckets, sources = [ref.bucket for ref in refs], [ref.source for ref in refs]
        return TrainOrder(
            len(refs), self.batch_size, seed=self.seed, weights=weights, sources=sources, buckets=buckets, **ranks
        )

    def _first_batches(self, refs: list[SampleRef], count: int, order: TrainOrder) -> list[SampleRef]:
        """The samples of so many batches, for overfitting: the set's first, or whole batches of a bucket or mixture."""
        if len(self.buckets) == 1 and self.weights is None:
            return refs[: count * order.global_batch]
        return [refs[number] for batch in range(min(count, len(order))) for number in order.global_numbers(batch)]

    def val_dataloader(self) -> SampleLoader:
        """All validation samples, in order."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> SampleLoader:
        """All test samples, in order."""
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: Split) -> SampleLoader:
        refs = self._refs[split]
        order = EvalOrder(len(refs), self.batch_size, buckets=[ref.bucket for ref in refs], **self._ranks())
        return SampleLoader(self._dataset(split, refs), order, self.errors, **self._worker_options(refs))

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """One row an input, in order, unreadable ones included; see :mod:`univigu.data.inputs`."""
        assert self._inputs is not None
        inputs, decodes = self._inputs, isinstance(self._inputs, VideoInputs)
        return DataLoader(
            inputs,
            batch_size=self.batch_size,
            collate_fn=inputs.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context="spawn" if decodes and self.num_workers else None,
        )
