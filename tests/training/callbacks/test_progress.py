"""Progress where output is no terminal: lines with what a log of a cluster needs, for every kind of work alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch.utils.data import DataLoader

from tests import tiny
from tests.training import test_stages as stages
from univigu.data import progress
from univigu.data.progress import LineProgress, track
from univigu.training.callbacks.monitor import ProgressLines
from univigu.training.module import UniViGU
from univigu.training.stages import StageSwitch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock to set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_few_seconds_and_at_the_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    bar = LineProgress(seconds=5)
    bar.get_time = lambda: clock[0]
    with bar:
        task = bar.add_task("encoding train shards", total=20)
        for _ in range(20):
            clock[0] += 2
            bar.advance(task, 1, {"loss": 0.34567}, clips=100)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and lines[0] == "encoding train shards: 1/20, loss 0.346"
    assert lines[1] == "encoding train shards: 4/20, loss 0.346, 50 clips/s, 0:00:32 left"
    assert [line.split(",")[0].rpartition(" ")[2] for line in lines] == [
        f"{i}/20" for i in (1, 4, 7, 10, 13, 16, 19, 20)
    ]


def test_a_tracked_loop_prints_lines_as_it_goes(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for number in track(range(4), "rendering"):
        clock[0] += 3
        assert len(capsys.readouterr().err.splitlines()) == number % 2  # after the steps 1 and 3, one line each
    assert capsys.readouterr().err.startswith("rendering: 4/4")


def test_in_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True))
    assert list(track(range(3), "rendering")) == [0, 1, 2]
    printed = capsys.readouterr().err
    assert "━" in printed and "3/3" in printed and "left" not in printed


@pytest.mark.slow
def test_fit_names_step_stage_losses_rate_and_time_left(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tiny.make_pipeline().save_pretrained("foundation")
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        enable_model_summary=False,
        accumulate_grad_batches=3,
        callbacks=[StageSwitch(stages.STAGES), ProgressLines(seconds=0)],
        **options,
    )
    trainer.fit(UniViGU("foundation"), DataLoader(stages.Clips(), batch_size=stages.BATCH))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fit ")]
    total = sum(stage.steps for stage in stages.STAGES.values())
    names = [name for name, stage in stages.STAGES.items() for _ in range(stage.steps)]
    assert [line.partition(",")[0] for line in lines] == [f"fit {name}: {i}/{total}" for i, name in enumerate(names, 1)]
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("stage ")]
    assert [re.sub(r" [\d.]+ M", "", line) for line in told] == [
        "stage recall, 2 steps: trained: text stream; frozen: generator",
        "stage refine, 4 steps: trained: generator, text stream; frozen: nothing",
    ]
    for line in lines[1:]:  # a rate needs two points
        assert re.search(r", train/loss [\d.e+-]+, train/video_loss .*, [\d.e+]+ clips/s, \d:\d\d:\d\d left$", line), (
            line
        )


def test_processes_but_the_first_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, lines = Trainer(accelerator="cpu", logger=False, barebones=True), ProgressLines(seconds=0)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    lines._advance(trainer, {"key": ["a"]}, "fit", 3)
    assert "fit" not in capsys.readouterr().err


@pytest.mark.parametrize(("terminal", "lines"), [(False, True), (True, False)])
def test_the_command_line_takes_one_of_both(
    terminal: bool, lines: bool, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, small_data: list[str]
) -> None:
    from univigu.training import lightning_cli

    class WithoutRun(lightning_cli.UniViGUCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    monkeypatch.setattr(lightning_cli, "Console", lambda: Console(force_terminal=terminal))
    trainer = WithoutRun(["fit", "--config=recall.yaml", *small_data]).trainer
    (bar,) = (callback for callback in trainer.callbacks if isinstance(callback, (ProgressBar, ProgressLines)))
    assert isinstance(bar, ProgressLines) == lines
    off = WithoutRun(["fit", "--config=recall.yaml", *small_data, "--trainer.enable_progress_bar=false"]).trainer
    assert not any(isinstance(callback, (ProgressBar, ProgressLines)) for callback in off.callbacks)
