"""Batches in a deterministic order that can be taken up again anywhere.

Which samples make up a batch is a pure function of its position in the endless sequence of training batches, so
the state of a training loader is a position.  torchdata's StatefulDataLoader was weighed and left: its state is
one of its workers, so that a run could not be resumed with another number of workers or ranks.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from univigu.data.encode import decode_video
from univigu.data.sample import (
    LATENTS_SUFFIX,
    PROMPT_SUFFIX,
    DataError,
    Sample,
    SampleError,
    SampleReason,
    parse_sample,
)
from univigu.data.shards import SampleRef
from univigu.models.foundation import TextTooLongError, tokenize

log = logging.getLogger(__name__)


# -------------------------------------------------------------------- order


class Order(Protocol):
    """Which samples make up the batch at a position."""

    def __len__(self) -> int: ...

    def batch(self, position: int) -> list[int]: ...


class TrainOrder:
    """Shuffled epochs of full batches, split by rank without gap or duplicate.

    The ``G = batch_size * world_size`` samples of a global batch are consecutive in the epoch's permutation, and
    rank r takes every ``world_size``-th of them from r on; what does not fill a global batch at the end of an epoch is
    left out of it.

    Args:
        num_samples: samples in the set.
        batch_size: samples a rank and batch.
        rank, world_size: this process among those that share the batches.
        seed: seeds the permutations, together with the epoch.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: expected one in [0, {world_size})")
        if num_samples < batch_size * world_size:
            raise DataError(
                f"batch_size={batch_size} on {world_size} rank(s): {num_samples} training samples do not fill one batch"
            )
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self._permutation = lru_cache(maxsize=1)(self._draw)

    @property
    def global_batch(self) -> int:
        """Samples a batch, all ranks together."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.num_samples // self.global_batch

    def batch(self, position: int) -> list[int]:
        """Samples of this rank at a position counted from the start of training, over all epochs."""
        epoch, number = divmod(position, len(self))
        start = number * self.global_batch
        return self._permutation(epoch)[start + self.rank : start + self.global_batch : self.world_size].tolist()

    def _draw(self, epoch: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randperm(self.num_samples, generator=generator)


class EvalOrder:
    """All samples once, in order, split by rank without gap or duplicate and with equally many batches a rank.

    Equally many, because sharded models wait for each other in every forward pass: a rank that is a batch short
    cuts one in two.  Only where it has too few samples for that (batch size 1, or fewer samples than ranks) does
    it repeat one.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        longest = -(-num_samples // world_size)
        own = list(range(rank, num_samples, world_size)) or [rank % num_samples]
        batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
        while len(batches) < -(-longest // batch_size):
            last = batches.pop()
            half = -(-len(last) // 2)
            batches += [last[:half], last[half:] or last]
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, position: int) -> list[int]:
        return self._batches[position]


class _Window(Sampler[list[int]]):
    """The batches from ``start`` on, ``len(order)`` of them."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.start = 0

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[int]]:
        start = self.start
        return (self.order.batch(start + i) for i in range(len(self.order)))


# ------------------------------------------------------------------ dataset


class VideoTextDataset(Dataset[tuple[dict[str, Any], list[SampleError]]]):
    """Whole batches of samples by their numbers.

    A sample that cannot be used is reported beside the batch, never raised: exceptions of worker processes lose
    their type.  With ``replace`` the next usable sample of the set takes its place, so that a batch keeps its size
    and does not depend on who loads it; without, the batch is smaller (but holds at least one sample).

    Args:
        refs: the samples.
        tokenizer: of the foundation.
        prompt_length, caption_length: slots in tokens.
        size: (num_frames, height, width) videos are brought to.
        latents_shape: (T, H, W) of precomputed latents.
        replace: see above.
    """

    def __init__(
        self,
        refs: list[SampleRef],
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        caption_length: int,
        size: tuple[int, int, int],
        latents_shape: tuple[int, int, int],
        replace: bool,
    ) -> None:
        self.refs = refs
        self.tokenizer = tokenizer
        self.lengths = {"prompt": prompt_length, "caption": caption_length}
        self.size = size
        self.latents_shape = latents_shape
        self.replace = replace
        # What is stored is the prompt's embedding, not a question's.
        self.stored_prompts = all(
            {PROMPT_SUFFIX, LATENTS_SUFFIX} <= ref.members.keys() and ref.question is None for ref in refs
        )
        """Whether the batches bring the prompts' embeddings along."""

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, numbers: list[int]) -> tuple[dict[str, Any], list[SampleError]]:
        """The batch of these samples (see :func:`collate`), and what was wrong with those that are not in it."""
        items: list[dict[str, Any]] = []
        errors: list[SampleError] = []
        for number in numbers:
            last_chance = not items and number == numbers[-1]
            tries = len(self.refs) if self.replace or last_chance else 1
            for offset in range(tries):
                try:
                    found = (number + offset) % len(self.refs)
                    items.append(self.load(self.refs[found]))
                    if not self.replace:
                        items[-1]["number"] = found  # so that evaluation sees what is there twice
                    break
                except SampleError as error:
                    errors.append(error)
        return (collate(items) if items else {}), errors

    def load(self, ref: SampleRef) -> dict[str, Any]:
        """One sample, decoded and tokenised, as a batch without the batch dimension.

        Raises:
            SampleError: naming shard, key and what is wrong.
        """
        sample = parse_sample(ref.read_all(), ref.shard, ref.key)
        texts = sample.texts.question(ref.question)
        item: dict[str, Any] = {"key": ref.key, "prompt": texts.prompt, "caption": texts.caption, "scene": texts.scene}
        if sample.latents is not None:
            if tuple(sample.latents.shape[1:]) != self.latents_shape:
                value = f"[T, H, W] is {list(sample.latents.shape[1:])}, expected {list(self.latents_shape)}"
                raise SampleError("wrong_shape", ref.shard, ref.key, "latents", value)
            item["latents"] = sample.latents
        else:
            assert sample.video is not None
            item["video"] = decode_video(sample.video, ref, *self.size)
        for name in ("prompt", "caption"):
            try:
                item[f"{name}_ids"] = tokenize(self.tokenizer, [item[name]], self.lengths[name], name)[0]
            except TextTooLongError as error:
                raise SampleError("text_over_slot", ref.shard, ref.key, name, str(error)) from error
        if self.stored_prompts:
            item |= self._stored_prompt(sample, item["prompt_ids"])
        return item

    def _stored_prompt(self, sample: Sample, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The sample's prompt embeddings and the empty prompt's, zero-padded to the prompt's slot: [S, text_dim]."""
        assert sample.prompt_embeds is not None and sample.null_embeds is not None
        tokens = int((ids != self.tokenizer.pad_token_id).sum())
        if len(sample.prompt_embeds) != tokens:
            value = f"embeddings of {len(sample.prompt_embeds)} tokens, the prompt has {tokens}"
            raise SampleError("wrong_shape", sample.shard, sample.key, "prompt", value)
        both = {"prompt_embeds": sample.prompt_embeds, "null_embeds": sample.null_embeds}
        slot = self.lengths["prompt"]
        return {name: torch.nn.functional.pad(value, (0, 0, 0, slot - len(value))) for name, value in both.items()}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch: tensors are stacked along a new first dimension, everything else becomes a list.

    Given samples of :meth:`VideoTextDataset.load`, that is ``key``, ``prompt``, ``caption``: list[str]; ``scene``:
    list[dict | None]; ``prompt_ids``, ``caption_ids``: int64 [B, L]; and either ``latents``: float32 [B, C, T, H, W]
    or ``video``: uint8 [B, F, C, H, W].  Where prompts are precomputed also ``prompt_embeds``: float32
    [B, S, text_dim], and ``null_embeds``, the empty prompt's, [1, S, text_dim].  Evaluation's batches also say the
    samples' places in the split, ``number``: list[int].
    """
    batch: dict[str, Any] = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        batch[name] = torch.stack(values) if isinstance(first, torch.Tensor) else values
    if "null_embeds" in batch:
        batch["null_embeds"] = batch["null_embeds"][:1]  # all samples bring the same
    return batch


def _unchanged(batch: Any) -> Any:
    return batch


# ------------------------------------------------------------------- loader


class ErrorLog:
    """Counts samples that could not be used and logs each of them once; in strict mode it raises the first."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.counts: Counter[SampleReason] = Counter()
        """Numbers of unusable samples by reason; one that is met in every epoch counts once."""
        self.seen: set[tuple[str, str | None, str]] = set()
        """(shard, key, reason) of each of them; the key is None where a shard is meant."""

    def add(self, errors: list[SampleError]) -> None:
        for error in errors:
            if self.strict:
                raise error
            identity = (error.shard, error.key, error.reason)
            if identity not in self.seen:
                self.seen.add(identity)
                self.counts[error.reason] += 1
                log.warning("skipped: %s", error)


class SampleLoader:
    """Batches of a dataset in a given order; iterating again starts over.

    It holds a DataLoader instead of being one, because Lightning takes a DataLoader's sampler out and puts
    its own in.

    Args:
        dataset: gives a batch for a list of numbers.
        order: which numbers.
        errors: takes note of samples that could not be used.
        num_workers: worker processes; 0 loads in this one.
        spawn: start workers afresh instead of forking them; needed where they decode videos, since decord's threads
            do not survive a fork.
    """

    def __init__(
        self, dataset: VideoTextDataset, order: Order, errors: ErrorLog, num_workers: int = 0, spawn: bool = False
    ) -> None:
        self.order = order
        self.errors = errors
        self._window = _Window(order)
        self._loader = DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=None,  # the sampler gives whole batches
            sampler=self._window,
            collate_fn=_unchanged,
            num_workers=num_workers,
            multiprocessing_context="spawn" if spawn and num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch, errors in self._loader:
            self.errors.add(errors)
            if not batch:
                raise DataError(f"none of {len(self._loader.dataset)} samples can be read: {dict(self.errors.counts)}")  # type: ignore[arg-type]
            yield batch

    # Lightning stops a loader's workers through this attribute when it is done or interrupted.
    @property
    def _iterator(self) -> Any:
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value


def _suffix(ref: SampleRef) -> str:
    return "" if ref.question is None else f"?{ref.question}"


class TrainLoader(SampleLoader):
    """An endless sequence of training batches, handed out ``len(self)`` (an epoch's worth) a pass.

    A pass goes on where the last one was left, in mid-epoch too; its batches may therefore belong to two epochs.
    That is what Lightning needs after a resume: it takes what is left of its own epoch and then asks for a new pass.

    The position counts batches handed to the training loop, not those that workers have fetched ahead.  Lightning
    saves it in every checkpoint (at the end of a step) and restores it; a checkpoint made by an exception *within*
    a step leaves that step's batch out.
    """

    order: TrainOrder

    def __init__(
        self,
        dataset: VideoTextDataset,
        order: TrainOrder,
        errors: ErrorLog,
        num_workers: int = 0,
        spawn: bool = False,
    ) -> None:
        super().__init__(dataset, order, errors, num_workers, spawn)
        self.position = 0
        names = "\n".join(f"{ref.shard.rpartition('/')[2]}/{ref.key}{_suffix(ref)}" for ref in dataset.refs)
        self._fingerprint = hashlib.sha256(names.encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._window.start = self.position
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position in samples over all ranks, and what it refers to."""
        epoch, number = divmod(self.position, len(self))
        return {
            "epoch": epoch,
            "samples": number * self.order.global_batch,
            "seed": self.order.seed,
            "dataset": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        With another number of ranks or workers the sequence of samples goes on exactly if the global batch is the
        same; with another global batch it goes on from the beginning of the batch the position falls into.

        Raises:
            DataError: the position refers to other samples or another seed.
        """
        for name, ours in (("seed", self.order.seed), ("dataset", self._fingerprint)):
            if state[name] != ours:
                raise DataError(
                    f"the checkpoint's data position refers to {name}={state[name]!r}, this run has {ours!r}; resume "
                    "with the same data, filter and seed, or start from the weights with model.init_from"
                )
        number, rest = divmod(state["samples"], self.order.global_batch)
        if rest:
            log.warning("resuming with another global batch: %d samples of this epoch will be seen again", rest)
        self.position = state["epoch"] * len(self) + min(number, len(self))
