"""The order of training and evaluation, with sources, weights and buckets."""

from __future__ import annotations

from collections import Counter

import pytest

from univigu.data.order import TrainOrder, eval_batches
from univigu.data.sample import DataError

SOURCES = [0] * 60 + [1] * 30 + [2] * 10
BUCKETS = [n % 7 // 3 for n in range(100)]  # 0, 1 and 2, unevenly, across the sources


def epoch(orders: list[TrainOrder], number: int) -> list[list[int]]:
    """The batches of all ranks."""
    start = number * len(orders[0])
    return [order.batch(start + i) for i in range(len(orders[0])) for order in orders]


def orders(world_size: int = 1, batch_size: int = 5, size: int = 100, **options: object) -> list[TrainOrder]:
    return [TrainOrder(size, batch_size, rank, world_size, **options) for rank in range(world_size)]  # type: ignore[arg-type]


# ------------------------------------------------------------------ sources


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("weights", [(1, 1, 1), (6, 3, 1), (0.1, 0.1, 0.8), (5, 1, 1e-9)])
def test_sources_have_their_shares(weights: tuple[float, ...], world_size: int) -> None:
    made = orders(world_size, 1, weights=weights, sources=SOURCES)
    for number in range(3):
        numbers = [n for batch in epoch(made, number) for n in batch]
        assert abs(len(numbers) - 100) <= world_size  # each share is rounded, and batches are whole
        drawn = Counter(SOURCES[n] for n in numbers)
        for source, weight in enumerate(weights):
            assert abs(drawn[source] - 100 * weight / sum(weights)) <= world_size


def test_a_sample_comes_at_most_once_where_weights_do_not_oversample() -> None:
    made = orders(weights=(0.5, 0.3, 0.2), sources=SOURCES)  # 50 of 60, 30 of 30, 20 of 10
    total: Counter[int] = Counter()
    for number in range(6):
        counts = Counter(n for batch in epoch(made, number) for n in batch)
        total += counts
        assert max(counts[n] for n in range(60)) == 1
        assert all(counts[n] == 1 for n in range(60, 90)) and all(counts[n] == 2 for n in range(90, 100))
    assert all(total[n] == 5 for n in range(60))  # 6 epochs of 50 are 5 passes of 60


def test_undersampled_sources_are_gone_through_before_anything_repeats() -> None:
    made = orders(weights=(7, 80, 13), sources=SOURCES)  # 7 an epoch of 60
    seen = [n for number in range(8) for batch in epoch(made, number) for n in batch if n < 60]
    assert len(seen) == len(set(seen)) == 56


def test_equal_weights_a_sample_are_the_plain_epoch() -> None:
    plain, mixed = orders(), orders(weights=(6, 3, 1), sources=SOURCES)
    for made in (plain, mixed):
        assert sorted(n for batch in epoch(made, 1) for n in batch) == list(range(100))


# ------------------------------------------------------------------ buckets


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_holds_one_bucket_and_an_epoch_every_sample_once(world_size: int, mixed: bool) -> None:
    options = {"weights": (6, 3, 1), "sources": SOURCES} if mixed else {}
    made = orders(world_size, batch_size=2, buckets=BUCKETS, **options)
    held = Counter(BUCKETS)
    whole = 2 * world_size
    left_out = set()
    for number in range(4):
        batches = epoch(made, number)
        for i in range(0, len(batches), world_size):  # all ranks, too: their steps take equally long
            assert len({BUCKETS[n] for batch in batches[i : i + world_size] for n in batch}) == 1
        numbers = [n for batch in batches for n in batch]
        assert len(numbers) == len(set(numbers))
        assert Counter(BUCKETS[n] for n in numbers) == {b: n // whole * whole for b, n in held.items()}
        left_out.add(frozenset(range(100)) - set(numbers))
    assert len(left_out) == 4 or not any(left_out)  # others every time
    sequence = [BUCKETS[batch[0]] for batch in epoch(made, 0)[::world_size]]
    assert sequence != sorted(sequence) and sequence != [BUCKETS[b[0]] for b in epoch(made, 1)[::world_size]]


@pytest.mark.parametrize("buckets", [None, BUCKETS])
def test_the_global_batch_does_not_depend_on_the_ranks(buckets: list[int] | None) -> None:
    (alone,), shared = orders(1, 6, buckets=buckets), orders(3, 2, buckets=buckets)
    for position in range(40):
        assert sorted(alone.batch(position)) == sorted(n for order in shared for n in order.batch(position))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    (order,) = orders()
    assert order.batch(0) != order.batch(len(order)) and order.batch(0) != orders(seed=4)[0].batch(0)


def test_weights_and_buckets_keep_the_number_of_batches() -> None:
    made = orders(2, 2, weights=(1, 5, 3), sources=SOURCES, buckets=BUCKETS)
    counts = [Counter(BUCKETS[n] for batch in epoch(made, number) for n in batch) for number in range(5)]
    assert all(count == counts[0] for count in counts)
    shares = Counter(SOURCES[n] for number in range(5) for batch in epoch(made, number) for n in batch)
    assert [round(9 * shares[i] / shares.total()) for i in range(3)] == [1, 5, 3]


def test_too_few_samples_for_a_batch() -> None:
    with pytest.raises(DataError, match=r"batch_size=4 on 2 rank\(s\): 7 training samples do"):
        TrainOrder(7, 4, 0, 2)
    with pytest.raises(DataError, match=r"batch_size=4 on 2 rank\(s\): 3 training samples of data\.buckets\[1\] do"):
        TrainOrder(20, 4, 0, 2, buckets=[0] * 17 + [1] * 3)


@pytest.mark.parametrize("size", [1, 5, 8, 9, 17, 100])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("buckets", [None, BUCKETS])
def test_evaluation_sees_everything_once(size: int, batch: int, world_size: int, buckets: list[int] | None) -> None:
    buckets = None if buckets is None else buckets[:size]
    made = [eval_batches(size, batch, rank, world_size, buckets) for rank in range(world_size)]
    assert len({len(batches) for batches, _ in made}) == 1  # sharded models would wait for ever otherwise
    seen: list[int] = []
    for of_ranks in zip(*(batches for batches, _ in made), strict=True):
        assert all(1 <= len(b) <= batch for b in of_ranks)
        assert buckets is None or len({buckets[n] for b in of_ranks for n in b}) == 1
        seen += [n for b in of_ranks for n in b]
    assert set(seen) == set(range(size)) and sorted(n for _, own in made for n in own) == list(range(size))
    assert all(own <= {n for b in batches for n in b} for batches, own in made)
    if batch > 1 and min(Counter(buckets or [0] * size).values()) >= world_size:
        assert len(seen) == size
