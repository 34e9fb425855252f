"""The tool that measures published figures again: what it compares, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import reproduce

ROW = {"about": "two clips", "tolerance": 0.01, "published": {"test/caption/shape": 0.5}, "commands": []}


def test_figures_are_compared_with_their_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.compare({"test/caption/shape": 0.509}, ROW)
    assert not reproduce.compare({"test/caption/shape": 0.511}, ROW)
    assert not reproduce.compare({}, ROW)  # a figure that was not measured is not reproduced
    assert capsys.readouterr().out.count("NOT reproduced") == 2


def test_rows_are_listed_and_unknown_ones_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main([]) == 0
    listed = capsys.readouterr().out
    rows = json.loads(reproduce.ROWS.read_text())
    assert all(name in listed for name in rows)
    assert reproduce.main(["nothing"]) == 2
    assert "row 'nothing': expected one of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_is_run_and_another_figure_is_not_reproduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = json.loads(reproduce.ROWS.read_text())["shipped-captions"]["commands"]
    folders = ["--data.root", str(tmp_path / "data"), "--trainer.default_root_dir", str(tmp_path / "run")]
    small = [
        "--data.num_val_clips",
        "2",
        "--data.num_train_clips",
        "16",
        "--model.sampling.caption_steps",
        "4",
        *folders,
    ]
    wrong = {**ROW, "commands": [[*command, *small]], "published": {"test/caption/count": 3.0}}
    (tmp_path / "rows.json").write_text(json.dumps({"wrong": wrong}))
    monkeypatch.chdir(Path(reproduce.__file__).parents[1])
    monkeypatch.setattr(reproduce, "ROWS", tmp_path / "rows.json")
    assert reproduce.main(["wrong"]) == 1
    assert "published 3.0000  OUTSIDE" in capsys.readouterr().out
