from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from univigu.data.datamodule import VideoTextDataModule
from univigu.data.order import EvalOrder, TrainOrder
from univigu.data.sample import DataError


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_epoch_without_gap_or_duplicate(world_size: int) -> None:
    size, batch = 100, 4
    orders = [TrainOrder(size, batch, rank, world_size, seed=3) for rank in range(world_size)]
    for epoch in range(3):
        start = epoch * len(orders[0])
        seen = [n for i in range(len(orders[0])) for order in orders for n in order.batch(start + i)]
        assert len(seen) == len(set(seen)) == size // (batch * world_size) * batch * world_size
        assert set(seen) <= set(range(size))
    assert orders[0].batch(0) != orders[0].batch(len(orders[0]))  # another epoch, another order
    assert orders[0].batch(0) != TrainOrder(size, batch, 0, world_size, seed=4).batch(0)
    assert all(len(order.batch(i)) == batch for order in orders for i in range(50))


def test_the_global_batch_does_not_depend_on_the_ranks() -> None:
    alone = TrainOrder(50, 6, seed=1)
    shared = [TrainOrder(50, 2, rank, 3, seed=1) for rank in range(3)]
    for position in range(20):
        assert sorted(alone.batch(position)) == sorted(n for order in shared for n in order.batch(position))


@pytest.mark.parametrize("size", [1, 5, 8, 9, 17])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_everything_once(size: int, batch: int, world_size: int) -> None:
    orders = [EvalOrder(size, batch, rank, world_size) for rank in range(world_size)]
    assert len({len(order) for order in orders}) == 1  # sharded models would wait for ever otherwise
    batches = [order.batch(i) for order in orders for i in range(len(order))]
    assert all(1 <= len(b) <= batch for b in batches)
    seen = [n for b in batches for n in b]
    assert set(seen) == set(range(size))
    assert sorted(n for order in orders for n in order.own) == list(range(size))
    assert all(order.own <= {n for i in range(len(order)) for n in order.batch(i)} for order in orders)
    if batch > 1 and size >= world_size:
        assert len(seen) == size


def test_too_few_samples_for_a_batch() -> None:
    with pytest.raises(DataError, match=r"batch_size=4 on 2 rank\(s\): 7 training samples"):
        TrainOrder(7, 4, 0, 2)
    with pytest.raises(ValueError, match=r"rank=2: expected one in \[0, 2\)"):
        TrainOrder(70, 4, 2, 2)


# ------------------------------------------------------------------- resume


class Stop(Callback):
    """Asks for the end in the middle of an epoch, as a time limit would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


Fit = Callable[..., list[list[str]]]


@pytest.fixture(scope="module")
def fit(world: dict[str, Any], recorder: Any) -> Fit:
    """Trains, with a checkpoint after every step, and gives the keys of the batches that were trained on."""

    def run(
        folder: Path, steps: int, ckpt: Path | None = None, num_workers: int = 0, **options: Any
    ) -> list[list[str]]:
        model = recorder()
        checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [checkpoint, *options.pop("callbacks", [])]
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            default_root_dir=str(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **{"limit_val_batches": 0, **options},
        )
        data = VideoTextDataModule(**{**world, "num_workers": num_workers})
        trainer.fit(model, datamodule=data, ckpt_path=ckpt)
        return model.seen

    return run


@pytest.fixture(scope="module")
def uninterrupted(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[str]], Path]:
    """The batches of two and a half epochs of 6 batches, and a folder with a checkpoint after every one."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return fit(folder, 15, num_workers=2), folder


def test_an_epoch_holds_every_sample_once(uninterrupted: tuple[list[list[str]], Path]) -> None:
    seen, _ = uninterrupted
    for epoch in (seen[:6], seen[6:12]):
        keys = [key for batch in epoch for key in batch]
        assert len(set(keys)) == 12  # of 13 with batches of 2
    assert seen[:6] != seen[6:12]


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (5, 0), (6, 0), (7, 0), (12, 0), (4, 2), (6, 2), (11, 1)])
def test_resuming_goes_on_exactly(
    fit: Fit, uninterrupted: tuple[list[list[str]], Path], tmp_path: Path, step: int, workers: int
) -> None:
    seen, folder = uninterrupted
    assert fit(tmp_path, 15, folder / f"step={step}.ckpt", num_workers=workers) == seen[step:]


def test_stopping_and_resuming_repeatedly(
    fit: Fit, uninterrupted: tuple[list[list[str]], Path], tmp_path: Path
) -> None:
    first = fit(tmp_path, 15, callbacks=[Stop(4)])
    second = fit(tmp_path, 15, tmp_path / "step=4.ckpt", callbacks=[Stop(9)])
    third = fit(tmp_path, 15, tmp_path / "step=9.ckpt")
    assert [len(first), len(second), len(third)] == [4, 5, 6]
    assert first + second + third == uninterrupted[0]


@pytest.mark.parametrize("options", [{"limit_train_batches": 4}, {"val_check_interval": 2, "limit_val_batches": 1}])
def test_resuming_with_short_epochs_and_validation(fit: Fit, tmp_path: Path, options: Any) -> None:
    seen = fit(tmp_path / "a", 11, **options)
    for step in (3, 4, 6):
        assert fit(tmp_path / str(step), 11, tmp_path / "a" / f"step={step}.ckpt", **options) == seen[step:]


def test_a_position_survives_another_number_of_ranks(world: dict[str, Any]) -> None:
    data = VideoTextDataModule(**{**world, "batch_size": 4})
    data.setup("fit")
    one = data.train_dataloader()
    assert len(list(one)) == 3
    iterator = iter(one)
    next(iterator)
    state = one.state_dict()
    assert state == {"epoch": 1, "samples": 4, "global_batch": 4, "seed": 0, "dataset": state["dataset"]}
    expected = sorted(next(iterator)["key"])
    data.batch_size = 2
    keys = []
    for rank in range(2):
        data._ranks = lambda rank=rank: {"rank": rank, "world_size": 2}  # type: ignore[method-assign, misc]
        loader = data.train_dataloader()
        loader.load_state_dict(state)
        keys += next(iter(loader))["key"]
    assert sorted(keys) == expected


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_train_clips": 12}])
def test_a_position_in_other_data_is_refused(world: dict[str, Any], change: dict[str, int]) -> None:
    data = VideoTextDataModule(**world)
    data.setup("fit")
    state = data.train_dataloader().state_dict()
    if "seed" in change:
        data.seed = change["seed"]
    else:
        data._refs["train"] = data._refs["train"][: change["num_train_clips"]]
    with pytest.raises(DataError, match="the checkpoint's data position refers to"):
        data.train_dataloader().load_state_dict(state)


def test_overfitting_repeats_the_same_samples(fit: Fit, tmp_path: Path) -> None:
    seen = fit(tmp_path, 6, overfit_batches=2)
    assert len({key for batch in seen for key in batch}) == 4
