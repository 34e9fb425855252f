"""Signals in the middle of a step: saved is what its end left, so that training goes on exactly."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from tests.training import test_stages as stages
from univigu.cli import exit_code
from univigu.training.callbacks.checkpoint import LastCheckpoint, find_last
from univigu.training.module import UniViGU
from univigu.training.stages import StageSwitch


class Preempted(Callback):
    """Sends signals from within a step, and notes the weights after every step."""

    def __init__(self, *signals: int, step: int = 2) -> None:
        self.signals, self.step = signals, step
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == self.step - 1:
            for number in self.signals:
                os.kill(os.getpid(), number)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of one task, and a command that requeues it and writes down that it was asked to."""
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    for name, value in {"NTASKS": "1", "JOB_ID": "77", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return tmp_path / "asked"


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal")
def test_the_signal_waits_for_the_steps_end(folder: Path, tmp_path: Path, slurm: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    noted = Preempted(signal.SIGUSR1)
    callbacks = [StageSwitch(stages.STAGES), noted, LastCheckpoint()]
    trainer = stages.make_trainer(tmp_path, callbacks, devices=1, plugins=[SLURMEnvironment(auto_requeue=True)])
    trainer.fit(UniViGU(str(folder), seed=3), DataLoader(stages.Clips(), batch_size=stages.BATCH))
    assert slurm.read_text().split() == ["requeue", "77"]
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == 2  # Lightning alone would have saved 1, in the middle of the second step
    assert saved["state_dict"].keys() == noted.weights[1].keys()
    assert all(torch.equal(value, noted.weights[1][name]) for name, value in saved["state_dict"].items())
    assert not all(torch.equal(value, noted.weights[0][name]) for name, value in saved["state_dict"].items())
    assert signal.getsignal(signal.SIGUSR1) == before


def fit(folder: Path, root: Path, *more: Callback, **options: Any) -> None:
    """A run by which the command line would answer signals."""
    trainer = stages.make_trainer(root, [StageSwitch(stages.STAGES), LastCheckpoint(), *more])
    loader = DataLoader(stages.Clips(), batch_size=stages.BATCH)
    trainer.fit(UniViGU(str(folder), seed=3), loader, weights_only=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_after_its_step(folder: Path, tmp_path: Path, number: int, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        exit_code(lambda: fit(folder, tmp_path / "cut", Preempted(number, step=stages.EPOCH)))
    assert ended.value.code == code and signal.getsignal(number) == before
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == stages.EPOCH
    whole, resumed = Preempted(), Preempted()
    fit(folder, tmp_path / "whole", whole)
    fit(folder, tmp_path / "cut", resumed, ckpt_path=last)
    assert len(resumed.weights) == len(whole.weights) - stages.EPOCH
    assert all(torch.equal(value, resumed.weights[-1][name]) for name, value in whole.weights[-1].items())


def test_a_second_signal_ends_training_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        exit_code(lambda: fit(folder, tmp_path, Preempted(signal.SIGINT, signal.SIGTERM)))
    assert ended.value.code == 143 and not (tmp_path / "checkpoints").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stages.tiny.make_pipeline().save_pretrained(tmp_path / "foundation")
    return tmp_path / "foundation"


def test_a_folder_is_replaced_and_an_old_one_found(folder: Path, tmp_path: Path) -> None:
    """What a sharded run leaves, also where it was killed between two names."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.mkdir(parents=True)
    (last / ".metadata").touch()
    assert find_last(last.parent) == last
    last.rename(last.with_suffix(".old"))
    assert find_last(last.parent) == last.with_suffix(".old")
    last.with_suffix(".old").rename(last)
    fit(folder, tmp_path)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(find_last(last.parent), weights_only=True)["global_step"] == 6
