"""Positions in training: the order of samples goes on exactly, whatever stops it and whatever resumes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from tests.data.conftest import fit, ranked
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.sample import DataError


class Stop(Callback):
    """Asks for the end in the middle of an epoch, as a time limit would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


@pytest.fixture(scope="module")
def data(world: dict[str, Any]) -> Callable[..., VideoTextDataModule]:
    return lambda **changes: VideoTextDataModule(**world | changes)


@pytest.fixture(scope="module")
def uninterrupted(data: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[str]], Path]:
    """The batches of two and a half epochs of 6 batches, and a folder with a checkpoint after every one."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return fit(data(num_workers=2), folder, 15).seen, folder


def test_an_epoch_holds_every_sample_once(uninterrupted: tuple[list[list[str]], Path]) -> None:
    seen, _ = uninterrupted
    for epoch in (seen[:6], seen[6:12]):
        keys = [key for batch in epoch for key in batch]
        assert len(set(keys)) == 12  # of 13 with batches of 2
    assert seen[:6] != seen[6:12]


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (5, 0), (6, 0), (7, 0), (4, 2), (12, 1)])
def test_resuming_goes_on_exactly(data: Any, uninterrupted: Any, tmp_path: Path, step: int, workers: int) -> None:
    seen, folder = uninterrupted
    assert fit(data(num_workers=workers), tmp_path, 15, folder / f"step={step}.ckpt").seen == seen[step:]


def test_stopping_and_resuming_repeatedly(data: Any, uninterrupted: Any, tmp_path: Path) -> None:
    first = fit(data(), tmp_path, 15, callbacks=[Stop(4)]).seen
    second = fit(data(), tmp_path, 15, tmp_path / "step=4.ckpt", callbacks=[Stop(9)]).seen
    third = fit(data(), tmp_path, 15, tmp_path / "step=9.ckpt").seen
    assert [len(first), len(second), len(third)] == [4, 5, 6]
    assert first + second + third == uninterrupted[0]


@pytest.mark.parametrize("options", [{"limit_train_batches": 4}, {"val_check_interval": 2, "limit_val_batches": 1}])
def test_resuming_with_short_epochs_and_validation(data: Any, tmp_path: Path, options: Any) -> None:
    seen = fit(data(), tmp_path / "a", 11, **options).seen
    for step in (3, 4, 6):
        checkpoint = tmp_path / "a" / f"step={step}.ckpt"
        assert fit(data(), tmp_path / str(step), 11, checkpoint, **options).seen == seen[step:]


def test_ranks_with_workers_share_an_epoch_and_its_rest(data: Any) -> None:
    module = data(num_workers=2, batch_size=1)
    module.setup("fit")
    loaders = ranked(module, 3)
    epoch = [[batch["key"][0] for batch in loader] for loader in loaders]
    keys = [key for rank in epoch for key in rank]
    assert len(keys) == len(set(keys)) == 12  # of 13
    module.num_workers = 0
    for loader, seen in zip(ranked(module, 3), epoch, strict=True):
        loader.load_state_dict({**loader.state_dict(), "samples": 6})
        assert [batch["key"][0] for _, batch in zip(range(2), loader, strict=False)] == seen[2:]


def test_a_position_survives_another_number_of_ranks(data: Any) -> None:
    module = data(batch_size=4)
    module.setup("fit")
    one = module.train_dataloader()
    assert len(list(one)) == 3
    iterator = iter(one)
    next(iterator)
    state = one.state_dict()
    assert state == {"epoch": 1, "samples": 4, "global_batch": 4, "seed": 0, "dataset": state["dataset"]}
    expected = sorted(next(iterator)["key"])
    module.batch_size, keys = 2, []
    for loader in ranked(module, 2):
        loader.load_state_dict(state)
        keys += next(iter(loader))["key"]
    assert sorted(keys) == expected


@pytest.mark.parametrize("change", ["seed", "samples"])
def test_a_position_in_other_data_is_refused(data: Any, change: str) -> None:
    module = data()
    module.setup("fit")
    state = module.train_dataloader().state_dict()
    if change == "seed":
        module.seed = 1
    else:
        module._refs["train"] = module._refs["train"][:12]
    with pytest.raises(DataError, match="the checkpoint's data position refers to"):
        module.train_dataloader().load_state_dict(state)


def test_overfitting_repeats_the_same_samples(data: Any, tmp_path: Path) -> None:
    seen = fit(data(), tmp_path, 6, overfit_batches=2).seen
    assert len({key for batch in seen for key in batch}) == 4
