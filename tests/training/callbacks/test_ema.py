"""The running mean of the weights: its value, what sees it, and that it is saved and taken up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, default_collate

from tests import tiny
from tests.training import test_stages as stages
from univigu.checkpoint import load_weights
from univigu.evaluation.held_out import EvaluationOptions
from univigu.training.callbacks import WeightEMA
from univigu.training.callbacks.checkpoint import LastCheckpoint
from univigu.training.callbacks.held_out import FinalReport
from univigu.training.module import UniViGU
from univigu.training.stages import StageSwitch


class Track(Callback):
    """The weights before training and after every step, and what validation saw."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.seen: dict[str, torch.Tensor] = {}

    @staticmethod
    def copy(pl_module: Any) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in pl_module.transformer.named_parameters()}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights.append(self.copy(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.weights.append(self.copy(pl_module))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.seen = self.copy(pl_module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foundation")
    tiny.make_pipeline().save_pretrained(path)
    return path


class Report(FinalReport):
    """Notes the weights that it would caption with, and whether the last checkpoint is there."""

    def _captions(self, trainer: Trainer, pl_module: Any, console: Any) -> None:
        self.seen, self.saved = Track.copy(pl_module), Path(trainer.checkpoint_callback.last_model_path).exists()  # type: ignore[union-attr]


def test_the_report_is_made_of_the_mean_and_after_the_last_checkpoint(folder: Path, tmp_path: Path) -> None:
    module, report = UniViGU(str(folder), optimizer=stages.ADAMW, seed=3), Report()
    callbacks = [StageSwitch(stages.STAGES), WeightEMA(decay=0.5), report, LastCheckpoint(str(tmp_path))]
    trainer = stages.make_trainer(tmp_path, callbacks)
    trainer.fit(module, DataLoader(stages.Clips(), batch_size=stages.BATCH))
    used = load_weights(tmp_path / "last.ckpt").state_dict()
    trained = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert report.saved and all(torch.equal(value, used[name]) for name, value in report.seen.items())
    assert not torch.equal(trained["transformer.text_head.linear.weight"], used["text_head.linear.weight"])


def fit(folder: Path, root: Path, ckpt_path: Path | None = None) -> tuple[Track, UniViGU]:
    track, module = Track(), UniViGU(str(folder), optimizer=stages.ADAMW, seed=3)
    saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    callbacks = [StageSwitch(stages.STAGES), WeightEMA(decay=0.5, warmup=False), track, saver]
    trainer = stages.make_trainer(root, callbacks, num_sanity_val_steps=0)
    loaders = [DataLoader(stages.Clips(), batch_size=stages.BATCH) for _ in range(2)]
    trainer.fit(module, *loaders, ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=True)
    return track, module


@pytest.mark.slow
def test_the_mean_is_followed_validated_saved_and_resumed(folder: Path, tmp_path: Path) -> None:
    track, module = fit(folder, tmp_path)
    expected = [track.weights[0]]
    for weights in track.weights[1:]:
        expected.append({name: 0.5 * (mean + weights[name]) for name, mean in expected[-1].items()})
    assert len(expected) == 7
    name = "text_head.linear.weight"
    assert (expected[6][name] - track.weights[6][name]).abs().max() > 1e-5
    for key, value in Track.copy(module).items():  # the mean is what training made
        torch.testing.assert_close(value, expected[6][key])
        torch.testing.assert_close(track.seen[key], expected[6][key])
    loaded = load_weights(tmp_path / "step=3.ckpt")
    for key, value in loaded.named_parameters():
        torch.testing.assert_close(value, expected[3][key])
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved[f"transformer.{name}"], track.weights[3][name])

    again, resumed = fit(folder, tmp_path / "again", tmp_path / "step=3.ckpt")
    assert all(torch.equal(value, again.weights[-1][key]) for key, value in track.weights[-1].items())
    for key, value in Track.copy(resumed).items():
        assert torch.equal(value, Track.copy(module)[key]), key


@pytest.mark.slow
def test_prediction_takes_the_mean(folder: Path, tmp_path: Path) -> None:
    """A checkpoint with means is evaluated without the callback, on the means."""
    fit(folder, tmp_path)
    module = UniViGU(str(folder), optimizer=stages.ADAMW, seed=3, evaluation=EvaluationOptions(generation=False))
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=[StageSwitch(stages.STAGES)], enable_progress_bar=False
    )

    def with_texts(items: list[dict[str, Any]]) -> dict[str, Any]:
        unknown: dict[str, Any] = {"scene": [None] * len(items)}
        return default_collate(items) | unknown | {name: ["a ring"] * len(items) for name in ("prompt", "caption")}

    loader = DataLoader(stages.Clips(), batch_size=stages.BATCH, collate_fn=with_texts)
    trainer.validate(module, loader, ckpt_path=str(tmp_path / "step=3.ckpt"), weights_only=True)
    expected = load_weights(tmp_path / "step=3.ckpt").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.transformer.state_dict().items())


class Stop(Callback):
    """Ends training after some step: from "on_train_batch_end" as ``max_time`` does, from others as early stopping."""

    def __init__(self, step: int, hook: str) -> None:
        def stop(trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step == step

        setattr(self, hook, stop)


def make_ema() -> WeightEMA:
    return WeightEMA(decay=0.5, warmup=False)


def fit_to_last(
    folder: Path, root: Path, average: Callback | None, *more: Callback, resume: Path | None = None, **options: Any
) -> dict[str, Any]:
    """What a run leaves in last.ckpt, which it saves after every second step."""
    averages = [average] if average else []
    callbacks = [StageSwitch(stages.STAGES), *averages, *more, LastCheckpoint(every_n_train_steps=2)]
    trainer = stages.make_trainer(root, callbacks, num_sanity_val_steps=0, **options)
    loaders = [DataLoader(stages.Clips(), batch_size=stages.BATCH) for _ in range(2)]
    trainer.fit(
        UniViGU(str(folder), optimizer=stages.ADAMW, seed=3),
        *loaders,
        ckpt_path=None if resume is None else str(resume),
        weights_only=True,
    )
    path = root / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True) if path.exists() else {}


def assert_same(first: Any, second: Any, name: str) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys(), name
        for key, value in first.items():
            assert_same(value, second[key], f"{name}.{key}")
    elif isinstance(first, list | tuple):
        assert_same(dict(enumerate(first)), dict(enumerate(second)), name)
    else:
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "end",
    [
        "max_steps",
        "on_train_batch_end",
        pytest.param("on_validation_end", marks=pytest.mark.slow),
        pytest.param("on_train_epoch_end", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_ends_early_resumes_exactly(folder: Path, tmp_path: Path, end: str) -> None:
    """Its checkpoint holds the trained weights, to which the optimizer's state belongs, and the means."""
    whole = fit_to_last(folder, tmp_path / "whole", make_ema())
    if end == "max_steps":
        short = fit_to_last(folder, tmp_path / "short", make_ema(), max_steps=3)
    else:
        short = fit_to_last(folder, tmp_path / "short", make_ema(), Stop(3, end))
    path = tmp_path / "short" / "checkpoints" / "last.ckpt"
    name = "text_head.linear.weight"
    trained, mean = (short["state_dict"][f"{kind}.{name}"] for kind in ("transformer", "ema"))
    assert short["global_step"] == 3 and not torch.equal(trained, mean)
    assert torch.equal(load_weights(path).state_dict()[name], mean)  # what is used

    resumed = fit_to_last(folder, tmp_path / "resumed", make_ema(), resume=path)
    assert whole["global_step"] == resumed["global_step"] == 6
    for part in ("state_dict", "optimizer_states"):
        assert_same(whole[part], resumed[part], part)


@pytest.mark.slow
def test_the_last_step_is_saved_once_and_a_trial_run_saves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = Trainer.save_checkpoint

    def noted(self: Trainer, *args: Any, **kwargs: Any) -> None:
        saved.append(self.global_step)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", noted)
    for steps, expected in ((3, [2, 3]), (4, [2, 4])):
        fit_to_last(folder, tmp_path / str(steps), None, max_steps=steps)
        assert saved == expected
        saved.clear()
    fit_to_last(folder, tmp_path / "trial", None, fast_dev_run=True)
    assert not saved


@pytest.mark.parametrize("before", [True, False])
def test_a_resumed_run_averages_as_before(folder: Path, tmp_path: Path, before: bool) -> None:
    fit_to_last(folder, tmp_path, make_ema() if before else None, max_steps=1)
    message = rf"last\.ckpt: .*the WeightEMA callback': \({before}, {not before}\).*model\.init_from"
    with pytest.raises(MisconfigurationException, match=message):
        average, path = None if before else make_ema(), tmp_path / "checkpoints" / "last.ckpt"
        fit_to_last(folder, tmp_path / "b", average, resume=path, max_steps=2)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_is_checked(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay={decay}"):
        WeightEMA(decay)
