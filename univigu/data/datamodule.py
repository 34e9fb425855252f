"""The LightningDataModule: prepares shards, selects samples, and makes the loaders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from univigu.data.buckets import Bucket, Grid, choose_bucket
from univigu.data.engine import SpawnPool, this_device
from univigu.data.index import list_shards
from univigu.data.inputs import PredictionInputs, PredictTask, find_inputs
from univigu.data.loader import ErrorLog, SampleLoader, TrainLoader, VideoTextDataset
from univigu.data.options import LengthFilter, check_least
from univigu.data.order import TrainOrder, eval_batches
from univigu.data.sample import DataError, SampleError, SampleRef
from univigu.data.sources import Source, SourceFolder, Split, encode_shards, fetch_shards, is_large, source_weights
from univigu.models.foundation import EMBEDDED_FOUNDATION, Foundation
from univigu.models.tokens import token_count
from univigu.shapes.write import world_fingerprint, write_shapes

log = logging.getLogger(__name__)

SPLITS: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}
"""Splits that a trainer's function uses."""


@dataclass(eq=False, repr=False)
class VideoTextDataModule(LightningDataModule):
    """Videos with a brief prompt and a detailed caption, from shards; and the inputs of prediction.

    Args:
        foundation: WanPipeline folder with the tokenizer, and the encoders for precomputation.
        root: folder for the embedded world if ``shards`` is not given, and for copies of remote shards.
        shards: folder or URL with train/, val/ and test/ of shards or videos, or lists train.csv and so on
            (docs/DATA.md); or a list of sources with weights (docs/SOURCES.md).  None takes the embedded world.
        num_train_clips: clips of the embedded world's training split.
        num_val_clips: clips of its validation split, and of its test split.
        batch_size: samples of a batch on each device; in prediction videos, each with its questions.
        num_workers: loader processes; 0 loads in the training process.
        height: height of the videos in pixels.
        width: width of the videos in pixels.
        num_frames: frames of a video, 4k+1 for Wan's VAE.
        buckets: several sizes instead of one; a batch has one of them, and each clip gets the one that keeps most of
            it. Prediction uses the size above.
        prompt_length: slot of the prompt in tokens, end-of-sequence token included.
        caption_length: slot of the caption in tokens, end-of-sequence token included.
        length_filter: limits on the lengths of texts; samples outside of them are skipped.
        precompute: encode videos and prompts once, into a folder beside the shards; False encodes them on the fly.
        strict: raise on the first unusable sample instead of skipping it.
        texts: "caption" trains on prompt and caption; "qa" on each question as the prompt and its answer as the
            caption (with ``length_filter`` for short answers).
        seed: determines the order of the training samples.
        videos: inputs of captioning: a video file, a folder, a glob pattern, or a list of these.
        prompts: inputs of generation: a prompt, a .txt, .jsonl, .json, .csv or .parquet file, or a list of these.
        pairs: inputs of editing or question answering: a file of ``{video, prompt, strength}`` or ``{video,
            question}``, or such objects; see ``univigu.data.inputs.find_inputs``.
        predict_task: the model's; it decides which of the three inputs are needed.
    """

    foundation: str = EMBEDDED_FOUNDATION
    root: str = "runs/data/shapes"
    shards: list[Source] | str | None = None
    num_train_clips: int = 4000
    num_val_clips: int = 200
    batch_size: int = 16
    num_workers: int = 1
    height: int = 64
    width: int = 64
    num_frames: int = 9
    buckets: list[Bucket] | None = None
    prompt_length: int = 128
    caption_length: int = 256
    length_filter: LengthFilter = LengthFilter()  # noqa: RUF009
    precompute: bool = True
    strict: bool = False
    texts: Literal["caption", "qa"] = "caption"
    seed: int = 0
    videos: str | list[str] | None = None
    prompts: str | list[str] | None = None
    pairs: dict[str, Any] | list[dict[str, Any]] | str | None = None
    predict_task: PredictTask | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self.sources = [Source(self.shards)] if isinstance(self.shards, str) else self.shards
        self.weights = None if self.sources is None else source_weights(self.sources)
        self._slots = {"prompt": self.prompt_length, "caption": self.caption_length}
        check_least(self, "data.", batch_size=1, num_workers=0, height=2, width=2, num_frames=1)
        check_least(self, "data.", prompt_length=1, caption_length=1, num_train_clips=1, num_val_clips=1)
        self.size = Bucket(self.height, self.width, self.num_frames)
        """Size of the videos in prediction."""
        self.sizes = self.buckets or [self.size]
        """Sizes that videos are brought to."""
        for size in self.sizes:
            if self.sizes.count(size) > 1:
                raise ValueError(f"data.buckets={list(map(str, self.sizes))}: {size} is there twice")
        self.filter_counts: dict[str, dict[str, int]] = {}
        """By split: numbers of samples, "kept" and the others by reason.  Known after ``setup``."""
        self.longest: dict[str, int] = {}
        """Tokens of the longest prompt and caption that are used.  Known after ``setup``."""
        self.errors = ErrorLog(self.strict)
        """Unusable samples that were found so far, counted by reason."""
        self._refs: dict[Split, list[SampleRef]] = {}

    def prepare_data(self) -> None:
        """Write the embedded world and encode the shards, if that has not been done yet (one process a node)."""
        fn = None if self.trainer is None else self.trainer.state.fn
        wanted: tuple[Split, ...] = ("train", "val", "test") if fn is None else SPLITS[fn]
        splits = [split for split in wanted if self._folders_of(split)]
        if not splits:
            return
        self._latents_shapes()  # checks the sizes
        folders = self._folders()
        for folder in folders:
            for split in splits if folder.url is not None else ():
                fetch_shards(f"{folder.url}/{split}", folder.base / split, optional=split != "train")
        with SpawnPool() as pool, SpawnPool(1) as single:
            if self.sources is None:
                for split in splits:
                    num_clips = self.num_train_clips if split == "train" else self.num_val_clips
                    write_shapes(folders[0].videos(split), split, num_clips, engine=pool.map, **asdict(self.size))
            if not self.precompute:
                return
            jobs = [(folder, split) for split in splits for _, folder in self._folders_of(split)]
            for folder, split in jobs:  # before hours are spent on encoding another
                list_shards(folder.videos(split))
            # the trainer's GPU, or else the CPU; without a trainer this process's GPU, if there is one
            device = this_device() if self.trainer is None else str(self.trainer.strategy.root_device)
            device = device if device.startswith("cuda") and is_large(self.foundation, "vae") else "cpu"
            encoders = single if device != "cpu" or is_large(self.foundation, "text_encoder") else pool
            for folder, split in jobs:
                source, target, options = folder.videos(split), folder.folder(split), (self.sizes, self.strict)
                if source != target:
                    encode_shards(source, target, self.foundation, "float32", *options, encoders.map, device=device)

    def _folders(self) -> list[SourceFolder]:
        """The local folder of each source."""
        if self.sources is not None:
            paths = [source.path for source in self.sources]
        else:  # clips of other options go to another folder, so that what a running training reads stays as it is
            counts = f"{self.num_train_clips}x{self.num_val_clips}x{self.num_val_clips}"
            paths = [f"{self.root}/{self.size}-{counts}-{world_fingerprint()}"]
        return [SourceFolder(path, self.root, self.foundation, self.sizes, self.precompute) for path in paths]

    def _folders_of(self, split: Split) -> list[tuple[int, SourceFolder]]:
        """Numbers and folders of the sources of a split: all in training, else those that have it, or the first.

        Without validation there are none of a missing validation split.
        """
        folders = list(enumerate(self._folders()))
        existing = [(n, folder) for n, folder in folders if split == "train" or folder.videos(split).exists()]
        unused = split == "val" and self.sources is not None and getattr(self.trainer, "limit_val_batches", 1) == 0
        return existing or ([] if unused else folders[:1])

    def _latents_shapes(self) -> list[tuple[int, int, int]]:
        """(T, H, W) of each bucket's latents; raises DataError for a size that is no whole number of tokens."""
        grid = Grid.of(self.foundation)
        grid.latents_shape(self.size, "data.")
        return [grid.latents_shape(bucket, f"data.buckets[{number}].") for number, bucket in enumerate(self.sizes)]

    def setup(self, stage: str) -> None:
        """Index the shards and select samples ("fit", "validate", "test"), or find the inputs ("predict")."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
        if stage == "predict":
            self._latents_shapes()
            given = {"videos": self.videos, "prompts": self.prompts, "pairs": self.pairs}
            inputs = find_inputs(given, self.predict_task)
            self._inputs = PredictionInputs(inputs, self.size, self.tokenizer, self.prompt_length)
            return
        for split in SPLITS[stage]:
            if split not in self._refs and self._folders_of(split):
                self._refs[split] = self._select(split)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return Foundation(self.foundation).tokenizer

    def _select(self, split: Split) -> list[SampleRef]:
        """The usable samples of all sources that pass the filter and fit their slots; counts them and the others."""
        kept, counts, shapes = list[SampleRef](), Counter[str](), self._latents_shapes()
        for source, folder in self._folders_of(split):
            refs, errors = folder.index(split)
            found, filtered = list[SampleRef](), Counter[str]()
            for ref in refs:
                try:
                    texts = ref.texts()
                    ref = replace(ref, source=source, bucket=choose_bucket(ref, self.sizes, shapes))
                except SampleError as error:
                    errors.append(error)
                    continue
                pairs = [texts]
                if self.texts == "qa":
                    pairs = [{"prompt": pair["question"], "caption": pair["answer"]} for pair in texts["qa"]]
                filtered["no_question"] += not pairs
                for number, pair in enumerate(pairs):
                    lengths = {name: token_count(self.tokenizer, pair[name]) for name in self._slots}
                    over = next((name for name, slot in self._slots.items() if lengths[name] > slot), None)
                    if reason := self.length_filter.reason(lengths["prompt"], lengths["caption"]):
                        filtered[reason] += 1
                    elif over is not None:  # texts are never truncated
                        value = f"{lengths[over]} tokens, {over}_length={self._slots[over]}"
                        errors.append(ref.error("text_over_slot", over, value))
                    else:
                        self.longest |= {name: max(size, self.longest.get(name, 0)) for name, size in lengths.items()}
                        found.append(replace(ref, question=number if self.texts == "qa" else None))
            self.errors.add(errors)
            filtered.update(error.reason for error in errors)
            numbers = {"kept": len(found), **dict(sorted((+filtered).items()))}
            log.info("%s: %s", folder.folder(split), numbers)
            if not found:
                raise DataError(f"{folder.folder(split)}: no sample is left for {split}: {numbers}")
            kept += found
            counts.update(numbers)
        self.filter_counts[split] = dict(counts)
        return kept

    def _ranks(self) -> dict[str, int]:
        """This process's rank among those that share the batches; tensor parallel processes have the same."""
        if self.trainer is None or self.trainer.world_size == 1:
            return {"rank": 0, "world_size": 1}
        kwargs = self.trainer.strategy.distributed_sampler_kwargs  # type: ignore[attr-defined]
        return {"rank": kwargs["rank"], "world_size": kwargs["num_replicas"]}

    def _dataset(self, split: Split, refs: list[SampleRef]) -> VideoTextDataset:
        shapes = self._latents_shapes()
        return VideoTextDataset(refs, self.tokenizer, self._slots, self.sizes, shapes, replace=split == "train")

    def train_dataloader(self) -> TrainLoader:
        """Shuffled full batches; its position is saved in checkpoints and restored."""
        refs = self._refs["train"]
        order = self._train_order(refs, self.weights)
        amount: int | float = getattr(self.trainer, "overfit_batches", 0)
        if amount > 0:
            wanted = amount if isinstance(amount, int) else max(1, int(amount * len(order)))
            batches = map(order.global_numbers, range(min(wanted, len(order))))
            refs = [refs[number] for batch in batches for number in batch]
            order = self._train_order(refs, None)
        multiple = getattr(self.trainer, "accumulate_grad_batches", 1)
        return TrainLoader(self._dataset("train", refs), order, self.errors, self.num_workers, multiple)

    def _train_order(self, refs: list[SampleRef], weights: list[float] | None) -> TrainOrder:
        sources, buckets = [ref.source for ref in refs], [ref.bucket for ref in refs]
        options: dict[str, Any] = {"weights": weights, "sources": sources, "buckets": buckets, **self._ranks()}
        return TrainOrder(len(refs), self.batch_size, seed=self.seed, **options)

    def val_dataloader(self, split: Split = "val") -> SampleLoader:
        refs = self._refs.get(split, [])
        batches, own = eval_batches(len(refs), self.batch_size, buckets=[ref.bucket for ref in refs], **self._ranks())
        return SampleLoader(self._dataset(split, refs), batches, self.errors, self.num_workers, own)

    def test_dataloader(self) -> SampleLoader:
        return self.val_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """One row an input, unusable ones included, a video's questions together; see ``univigu.data.inputs``."""
        workers: dict[str, Any] = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return DataLoader(self._inputs, batch_size=self.batch_size, collate_fn=self._inputs.collate, **workers)
