"""Loads batches in a deterministic order (``univigu.data.order``) that can be resumed anywhere."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from univigu.data.buckets import Bucket
from univigu.data.engine import start_worker
from univigu.data.order import TrainOrder
from univigu.data.sample import LATENTS_SUFFIX, PROMPT_SUFFIX, DataError, SampleError, SampleReason, SampleRef
from univigu.models.tokens import TextTooLongError, tokenize

log = logging.getLogger(__name__)


@dataclass(eq=False)
class VideoTextDataset(Dataset[tuple[dict[str, Any], list[SampleError]]]):
    """Batches of samples, by lists of their numbers.

    An unusable sample is an error beside the batch and never raised: exceptions of worker processes lose their type.
    """

    refs: list[SampleRef]
    tokenizer: PreTrainedTokenizerBase
    slots: dict[str, int]
    """Tokens of "prompt" and "caption"."""
    buckets: Sequence[Bucket]
    latents_shapes: Sequence[tuple[int, int, int]]
    """(T, H, W) of each bucket."""
    replace: bool
    """Whether the next usable sample of its bucket takes an unusable one's position; if not, the batch is smaller, but
    holds at least one sample."""

    def __post_init__(self) -> None:
        stored = {PROMPT_SUFFIX, LATENTS_SUFFIX}
        self.stored_prompts = all(stored <= ref.members.keys() and ref.question is None for ref in self.refs)
        """Whether the batches hold the prompts' embeddings (a question's are not stored)."""

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, numbers: list[int]) -> tuple[dict[str, Any], list[SampleError]]:
        """The samples of these numbers (see ``collate``; empty if none can be read), and errors of the others."""
        items, errors = list[dict[str, Any]](), list[SampleError]()
        for number in numbers:
            last_chance = not items and number == numbers[-1]
            for candidate in self._candidates(number, items) if self.replace or last_chance else [number]:
                try:
                    items.append({**self.load(self.refs[candidate]), "number": candidate})
                    break
                except SampleError as error:
                    errors.append(copy(error))  # without the traceback, which keeps decoded frames in memory
        return collate(items), errors

    def _candidates(self, number: int, items: list[dict[str, Any]]) -> Iterator[int]:
        """The sample, then its replacements: from its bucket and, if the batch is still empty, from any other."""
        bucket = items[0]["bucket"] if items else self.refs[number].bucket
        for same in (True,) if items else (True, False):
            for other in chain(range(number, len(self.refs)), range(number)):
                if (self.refs[other].bucket == bucket) == same:
                    yield other

    def load(self, ref: SampleRef) -> dict[str, Any]:
        """One sample, decoded and tokenised, as a batch without the batch dimension."""
        item = {"key": ref.key, "source": ref.source, "bucket": ref.bucket, **ref.texts()}
        if ref.media == LATENTS_SUFFIX:
            (item["latents"],) = ref.tensors(LATENTS_SUFFIX, "latents")
            shape, expected = tuple(item["latents"].shape[1:]), self.latents_shapes[ref.bucket]
            if shape != expected:
                raise ref.error("wrong_shape", "latents", f"[T, H, W] is {list(shape)}, expected {list(expected)}")
        else:
            bucket = self.buckets[ref.bucket]
            item["video"] = ref.video(bucket.num_frames, bucket.height, bucket.width)
        for name, slot in self.slots.items():
            try:
                item[f"{name}_ids"] = tokenize(self.tokenizer, [item[name]], slot, name)[0]
            except TextTooLongError as error:
                raise ref.error("text_over_slot", name, str(error)) from error
        if self.stored_prompts:
            prompt, null = ref.tensors(PROMPT_SUFFIX, "prompt", "null")
            tokens = int((item["prompt_ids"] != self.tokenizer.pad_token_id).sum())
            if len(prompt) != tokens:
                raise ref.error("wrong_shape", "prompt", f"embeddings of {len(prompt)} tokens, the prompt has {tokens}")
            for name, embeds in (("prompt_embeds", prompt), ("null_embeds", null)):
                item[name] = torch.nn.functional.pad(embeds, (0, 0, 0, self.slots["prompt"] - len(embeds)))
        return item


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch: tensors are stacked along a new first dimension, everything else becomes a list.

    ``key``, ``prompt``, ``caption``: list[str]; ``scene``: list[dict | None]; ``source``, ``bucket``: list[int];
    ``number``: list[int], the samples' numbers in the split; ``qa``: list[list[dict[str, str]]], their questions
    and answers; ``question``: list[str | None], equal to the prompts where the captions are answers, and ``kind``:
    list[str | None], the questions'; ``prompt_ids``, ``caption_ids``: int64 [B, L]; either ``latents``: float32
    [B, C, T, H, W] or ``video``: uint8 [B, F, C, H, W] (in memory [B, F, H, W, C]); with precomputed prompts
    ``prompt_embeds``: float32 [B, S, text_dim] and ``null_embeds``, the empty prompt's, [1, S, text_dim].
    """
    batch: dict[str, Any] = {}
    for name, first in items[0].items() if items else ():
        values = [item[name] for item in items]
        if name == "video":  # stacked in their memory order
            batch[name] = torch.stack([frames.permute(0, 2, 3, 1) for frames in values]).permute(0, 1, 4, 2, 3)
        else:
            batch[name] = torch.stack(values) if isinstance(first, torch.Tensor) else values
    if "null_embeds" in batch:
        batch["null_embeds"] = batch["null_embeds"][:1]  # equal in all samples
    return batch


def of_all_ranks(value: Any) -> list[Any]:
    """The values of all ranks, in their order; every rank must call it."""
    values = [value]
    if dist.is_available() and dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


@dataclass
class ErrorLog:
    """Logs each unusable sample once and counts it by reason; in strict mode it raises the first."""

    strict: bool = False
    counts: Counter[SampleReason] = field(default_factory=Counter)
    seen: set[tuple[str, str | None, SampleReason]] = field(default_factory=set)

    def add(self, errors: list[SampleError]) -> None:
        for error in errors:
            if self.strict:
                raise error
            identity = (error.shard, error.key, error.reason)
            if identity not in self.seen:
                self.seen.add(identity)
                self.counts[error.reason] += 1
                log.warning("skipped: %s", error)


@dataclass(eq=False, repr=False)
class SampleLoader:
    """The given batches of a dataset, as lists of sample numbers; every pass starts from the beginning.

    It holds a DataLoader instead of being one, because Lightning replaces a DataLoader's sampler.
    """

    dataset: VideoTextDataset
    batches: list[list[int]]
    errors: ErrorLog
    num_workers: int = 0
    own: frozenset[int] | None = None
    """Samples that evaluation counts on this rank; others in its batches are repetitions.  None counts all."""

    def __post_init__(self) -> None:
        self.waited = 0.0
        """Seconds that the caller has waited for batches so far."""
        self._loader = DataLoader(
            self.dataset,
            batch_size=None,  # the sampler gives whole batches
            sampler=self.batches,
            num_workers=self.num_workers,
            worker_init_fn=start_worker,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = time.perf_counter()
        for batch, errors in self._loader:
            self.errors.add(errors)
            if not batch:
                raise DataError(f"none of {len(self.dataset)} samples can be read: {dict(self.errors.counts)}")
            self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    @property
    def _iterator(self) -> Any:
        """Lightning stops a loader's workers through DataLoader's private attribute of this name."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value


class TrainLoader(SampleLoader):
    """An endless sequence of training batches; each pass gives ``len(self)`` of them, at least an epoch's.

    A pass starts where the last one stopped, even in mid-epoch: after a resume Lightning takes the rest of its own
    epoch and then asks for a new pass.  The position counts batches given to the training loop, not those that workers
    have fetched ahead; Lightning saves it in every checkpoint.
    """

    def __init__(
        self, dataset: VideoTextDataset, order: TrainOrder, errors: ErrorLog, num_workers: int = 0, multiple: int = 1
    ) -> None:
        self.order, self.position = order, 0
        self.multiple = multiple
        """Of what the number of batches of a pass is a multiple: Lightning takes a step at its end in any case."""
        names = []
        for ref in dataset.refs:
            parts = (("?", ref.question), ("@", ref.source or None), ("#", ref.bucket or None))
            more = "".join(f"{mark}{number}" for mark, number in parts if number is not None)
            names.append(f"{ref.shard.rpartition('/')[2]}/{ref.key}{more}")
        names += [] if order.weights is None else [str(order.weights)]
        self._fingerprint = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]
        super().__init__(dataset, [], errors, num_workers)

    def __len__(self) -> int:
        return -(-len(self.order) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.batches[:] = map(self.order.batch, range(self.position, self.position + len(self)))
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def samples(self, start: int, stop: int) -> list[SampleRef]:
        """The samples of all ranks at the positions from ``start`` to before ``stop``."""
        return [self.dataset.refs[number] for at in range(start, stop) for number in self.order.global_numbers(at)]

    def state_dict(self) -> dict[str, Any]:
        """The position in samples of all ranks, and what it refers to."""
        epoch, number = divmod(self.position, len(self.order))
        size = self.order.global_batch
        state = {"epoch": epoch, "samples": number * size, "global_batch": size}
        return {**state, "seed": self.order.seed, "dataset": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; one in other samples, weights or buckets, or of another seed, is a DataError.

        The sequence of samples goes on exactly, or with another global batch from the start of the position's batch.
        """
        for name, ours in (("seed", self.order.seed), ("dataset", self._fingerprint)):
            if state[name] != ours:
                refers = f"the checkpoint's data position refers to {name}={state[name]!r}, this run has {ours!r}"
                raise DataError(f"{refers}; resume with the same shards, weights, buckets, filter and seed")
        number, rest = divmod(state["samples"], self.order.global_batch)
        if len(self.order.bucket_sizes) > 1 and state["global_batch"] != self.order.global_batch:
            log.warning("resuming with another global batch and buckets: samples of this epoch may come twice or never")
        elif rest:
            log.warning("resuming with another global batch: %d samples of this epoch will be seen again", rest)
        self.position = state["epoch"] * len(self.order) + min(number, len(self.order))
