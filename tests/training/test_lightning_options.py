"""Options of Lightning's trainer, its callbacks and its ways to load: they work, or are rejected by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from univigu.checkpoint import load_weights
from univigu.training.lightning_cli import UniViGUCLI
from univigu.training.module import UniViGU

Run = Callable[..., UniViGUCLI]


@pytest.fixture
def fit(in_tmp: Path, small_data: list[str]) -> Run:
    """A short training on two batches an epoch."""

    def run(*options: str) -> UniViGUCLI:
        quick = ["--model.sampling.caption_steps=1", "--media.every_n_steps=0", "--report.num_samples=1"]
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        return UniViGUCLI(["fit", "--config=configs/recall.yaml", *small_data, *quick, *quiet, *options])

    return run


@pytest.mark.slow
def test_gradients_are_accumulated_over_whole_steps(fit: Run) -> None:
    """Also where an epoch has fewer batches than a step."""
    cli = fit("--trainer.accumulate_grad_batches=4", "--trainer.max_steps=2")
    assert cli.trainer.global_step == 2 and cli.trainer.train_dataloader.position == 8
    assert cli.trainer.fit_loop.total_batch_idx == 7
    state = cli.trainer.train_dataloader.state_dict()
    assert (state["epoch"], state["samples"]) == (4, 0)  # epochs of the data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "steps"), [("max_epochs=1", 2), ("max_steps=3", 3), ("limit_train_batches=1", 6), ("fast_dev_run=1", 1)]
)
def test_training_ends_where_an_option_says(option: str, steps: int, fit: Run) -> None:
    cli = fit(f"--trainer.{option}", "--stages.recall.steps=6", "--trainer.limit_val_batches=1")
    assert cli.trainer.global_step == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["accumulate_grad_batches=3", "limit_train_batches=2"], "accumulate_grad_batches=3: an epoch has 2 batches"),
        (["reload_dataloaders_every_n_epochs=1"], "reload_dataloaders_every_n_epochs=1: expected 0"),
        (["precision=16-true"], "precision='16-true': expected 32-true, bf16-mixed"),
    ],
)
def test_what_would_go_wrong_is_rejected(
    options: list[str], message: str, in_tmp: Path, small_data: list[str], failing: Callable[[list[str]], str]
) -> None:
    args = ["fit", "--config=configs/recall.yaml", *small_data, *(f"--trainer.{option}" for option in options)]
    assert message in failing(args)


@pytest.mark.slow
def test_learning_rates_have_names_of_their_own(fit: Run) -> None:
    monitor = "--trainer.callbacks=lightning.pytorch.callbacks.LearningRateMonitor"
    cli = fit(monitor, "--trainer.max_steps=1", "--trainer.log_every_n_steps=1")
    names = {name for name in cli.trainer.logged_metrics if name.startswith("lr/")}
    assert names == {f"lr/{name}{kind}" for name in ("video", "text") for kind in ("", "_muon", "_matrix")}


class OwnCLI(UniViGUCLI):
    """A command line of one's own."""

    def __init__(self, args: Any) -> None:
        super().__init__(args, run=False, save_config_callback=None)


def test_a_command_line_and_loading_from_plain_python(in_tmp: Path, small_data: list[str]) -> None:
    options = ["--config=configs/recall.yaml", *small_data, "--trainer.max_steps=1", "--media.every_n_steps=0"]
    options += ["--model.architecture.text_flow=mask", "--report.num_samples=1", "--model.sampling.caption_steps=1"]
    cli = OwnCLI([*options, "--trainer.callbacks=univigu.training.callbacks.WeightEMA"])
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    path = shutil.copy("runs/recall/checkpoints/last.ckpt", "mine.ckpt")
    loaded = UniViGU.load_from_checkpoint(path, sampling=cli.model.sampling)
    expected = load_weights(path)
    assert loaded.transformer.config.text_flow == "mask" and loaded.sampling is cli.model.sampling
    state = loaded.transformer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
    assert not OwnCLI([]).stages  # to predict, say
