"""The running mean of the weights: its value, what sees it, and that it is saved and taken up."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, default_collate

from univigu.callbacks import StageSwitch, WeightEMA
from univigu.checkpoint import load_weights
from univigu.evaluation import EvaluationOptions
from univigu.module import UniViGU

HERE = Path(__file__).resolve().parent
tiny = SimpleNamespace(**runpy.run_path(str(HERE.parent / "tiny.py")))
stages = SimpleNamespace(**runpy.run_path(str(HERE.parent / "test_stages.py")))


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


def fit(folder: Path, root: Path, ckpt_path: Path | None = None) -> tuple[Track, UniViGU]:
    track, module = Track(), UniViGU(str(folder), seed=3)
    trainer = Trainer(
        default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[StageSwitch([stages.RECALL, stages.REFINE]), WeightEMA(decay=0.5, warmup=False), track,
                   ModelCheckpoint(root, filename="{step}", every_n_train_steps=3, save_top_k=-1)],
    )  # fmt: skip
    loaders = [DataLoader(stages.Clips(), batch_size=stages.BATCH) for _ in range(2)]
    trainer.fit(module, *loaders, ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=True)
    return track, module


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


def test_prediction_takes_the_mean(folder: Path, tmp_path: Path) -> None:
    """A checkpoint with means is evaluated without the callback, on the means."""
    fit(folder, tmp_path)
    module = UniViGU(str(folder), seed=3, evaluation=EvaluationOptions(generation=False))
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[StageSwitch([stages.RECALL, stages.REFINE])],
                      enable_progress_bar=False)  # fmt: skip

    def with_texts(items: list[dict[str, Any]]) -> dict[str, Any]:
        unknown: dict[str, Any] = {"scene": [None] * len(items)}
        return default_collate(items) | unknown | {name: ["a ring"] * len(items) for name in ("prompt", "caption")}

    loader = DataLoader(stages.Clips(), batch_size=stages.BATCH, collate_fn=with_texts)
    trainer.validate(module, loader, ckpt_path=str(tmp_path / "step=3.ckpt"), weights_only=True)
    expected = load_weights(tmp_path / "step=3.ckpt").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.transformer.state_dict().items())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_is_checked(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay={decay}"):
        WeightEMA(decay)
