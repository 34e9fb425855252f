"""Which samples make up a batch, as pure functions of its position, so that training can be resumed anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from univigu.data.sample import DataError


@dataclass(eq=False, repr=False)
class TrainOrder:
    """Shuffled epochs of full batches, split by rank without gap or duplicate.

    **Epoch.** Without ``weights`` an epoch holds every sample once.  With them it holds as many samples as there are
    (but for rounding), of which source s has the share ``weights[s] / sum(weights)``, spread over its buckets as its
    samples are.  A sample comes again only after all others of its source and bucket, over all epochs.

    **Batch.** The ``G = batch_size * world_size`` samples of a global batch are consecutive in the epoch's permutation
    (in what it holds of one bucket), and rank r takes every ``world_size``-th of them from r on.  What does not fill
    a global batch at the end of an epoch, in each bucket, is left out.  Batches of the buckets are shuffled.

    ``sources`` (numbers in ``weights``) and ``buckets`` are those of each sample, None if there is one.  Too few
    samples (of a bucket) for one global batch are a DataError.
    """

    num_samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    weights: Sequence[float] | None = None
    sources: Sequence[int] | None = None
    buckets: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.global_batch = self.batch_size * self.world_size
        """Samples a batch, all ranks together."""
        self._buckets = torch.tensor(self.buckets or [0] * self.num_samples)
        self._cells = [] if self.weights else [(torch.arange(self.num_samples), self.num_samples)]
        """The samples of each source and bucket in a fixed cyclic order, and how many of them an epoch takes next."""
        if self.weights is not None:
            self.weights = [weight / sum(self.weights) for weight in self.weights]
        for source, share in enumerate(self.weights or ()):
            of_source = torch.tensor(self.sources) == source
            for bucket in self._buckets.unique().tolist():
                numbers = (of_source & (self._buckets == bucket)).nonzero().flatten()
                if len(numbers):
                    quota = max(1, round(share * self.num_samples * len(numbers) / int(of_source.sum())))
                    generator = _generator(f"{self.seed}/source {source}/bucket {bucket}")
                    self._cells.append((numbers[torch.randperm(len(numbers), generator=generator)], quota))
        values, counts = self._buckets[self._members(0)].unique(return_counts=True)
        self.bucket_sizes = dict(zip(values.tolist(), counts.tolist(), strict=True)) or {0: 0}
        """Samples that an epoch draws of each bucket; whole global batches of them are used."""
        for bucket, size in self.bucket_sizes.items():
            if size < self.global_batch:
                of = f" of data.buckets[{bucket}]" if self.buckets and any(self.buckets) else ""
                batch = f"batch_size={self.batch_size} on {self.world_size} rank(s)"
                raise DataError(f"{batch}: {size} training samples{of} do not fill one batch")
        self._epoch = lru_cache(maxsize=1)(self._draw)

    def __len__(self) -> int:
        """Batches an epoch."""
        return sum(size // self.global_batch for size in self.bucket_sizes.values())

    def batch(self, position: int) -> list[int]:
        """Samples of this rank at a position counted from the start of training, over all epochs."""
        return self.global_numbers(position)[self.rank :: self.world_size]

    def global_numbers(self, position: int) -> list[int]:
        """Samples of all ranks at a position."""
        epoch, number = divmod(position, len(self))
        return self._epoch(epoch)[number].tolist()

    def _members(self, epoch: int) -> torch.Tensor:
        """The samples that an epoch draws from, with repetitions where sources are oversampled."""
        return torch.cat([n[(torch.arange(quota) + epoch * quota) % len(n)] for n, quota in self._cells])

    def _draw(self, epoch: int) -> torch.Tensor:
        """An epoch's global batches [len(self), G]."""
        generator, members = _generator(f"{self.seed}/{epoch}"), self._members(epoch)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        parts = [shuffled[self._buckets[shuffled] == bucket] for bucket in self.bucket_sizes]
        batches = torch.cat([part[: len(part) // self.global_batch * self.global_batch] for part in parts])
        batches = batches.view(-1, self.global_batch)
        if len(parts) > 1:
            batches = batches[torch.randperm(len(batches), generator=generator)]
        return batches


def _generator(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little"))


def eval_batches(
    num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1, buckets: Sequence[int] | None = None
) -> tuple[list[list[int]], frozenset[int]]:
    """All samples once, in order (bucket after bucket), split by rank without gap or duplicate.

    Returns the batches of a rank, and the samples that it counts; others in its batches are repetitions.

    All ranks have the same number of batches, because sharded models wait for each other in every forward pass: a rank
    with one batch less splits one of its own.  Only if it has too few samples (of a bucket) for that does it repeat
    one.  A batch holds samples of one bucket, the same on all ranks at a position.
    """
    by_bucket: dict[int, list[int]] = {}
    for number, bucket in enumerate(buckets or [0] * num_samples):
        by_bucket.setdefault(bucket, []).append(number)
    result: list[list[int]] = []
    counted: set[int] = set()
    for _, numbers in sorted(by_bucket.items()):
        counted.update(numbers[rank::world_size])
        own = numbers[rank::world_size] or [numbers[rank % len(numbers)]]
        batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
        longest = -(-len(numbers) // world_size)
        while len(batches) < -(-longest // batch_size):
            last = batches.pop()
            half = -(-len(last) // 2)
            batches += [last[:half], last[half:] or last]
        result += batches
    return result, frozenset(counted)
