"""A mistake on the command line gives one line: where, what is wrong, what may have been meant, what shows more."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPO, parse_command
from univigu.cli import SUBCOMMANDS, ToolParser, answer_at_once, options_of
from univigu.data.index import list_shards
from univigu.data.sample import DataError
from univigu.models.foundation import Foundation
from univigu.models.weights import CheckpointError
from univigu.pipeline import UniViGUPipeline
from univigu.training.parser import CONFIGS, find_config

FILES = {
    "key.yaml": "model: {fundation: x}\n",
    "data.yaml": "data: {batchsize: 4}\n",
    "stage.yaml": "stages:\n  recall:\n    stepz: 3\n",
    "section.yaml": "modle: {foundation: x}\n",
    "type.yaml": "data: {batch_size: four}\n",
    "class.yaml": "data: {class_path: univigu.data.datamodule.VideoTextDataModul}\n",
    "syntax.yaml": "stages: {recall: {steps: 3\n",
}


@pytest.mark.parametrize(
    ("arg", "told"),
    [
        ("--data.batchsize=4", "unknown option --data.batchsize; did you mean batch_size?"),
        ("--stages.recall.stepz=3", "unknown option --stages.recall.stepz; did you mean steps?"),
        ("--modle.foundation=x", "unknown option --modle.foundation; did you mean --model.foundation?"),
        ("--model={fundation: x}", "unknown option --model: model.fundation; did you mean --model.foundation?"),
        ("--trainer.max_step=4", "unknown option --trainer.max_step; did you mean --trainer.max_steps?"),
        ("--data.batch_size=four", "--data.batch_size: expected int, got 'four'"),
        ("--stages.recall.learning_rate=fast", "--stages.recall.learning_rate: expected float, got 'fast'"),
        ("--model.architecture.text_flow=maks", "got 'maks'; did you mean 'mask'?"),
        ("--trainer.logger=CSVLoger", "--trainer.logger: no class CSVLoger; did you mean CSVLogger?"),
        ("--data=my.Data", "--data: No module named 'my', got 'my.Data'"),
        ("--config=recal.yaml", "recal.yaml: no such file; did you mean recall.yaml?"),
        ("--config=key.yaml", "unknown option key.yaml: model.fundation; did you mean --model.foundation?"),
        ("--config=data.yaml", "unknown option data.yaml: batchsize; did you mean batch_size?"),
        ("--config=stage.yaml", "unknown option stage.yaml: stepz; did you mean steps?"),
        ("--config=section.yaml", "unknown option section.yaml: modle.foundation; did you mean --model.foundation?"),
        ("--config=type.yaml", "type.yaml: data.batch_size: expected int, got 'four'"),
        ("--config=class.yaml", "class.yaml: data: univigu.data.datamodule has no class VideoTextDataModul; did you"),
        ("--config=syntax.yaml", "syntax.yaml: while parsing a flow mapping"),
    ],
)
def test_lightning(
    arg: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    with pytest.raises(SystemExit) as end:
        parse_command(["fit", "--config=recall.yaml", arg])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith(f"error: {told}") or f": expected one of 'embedding', 'uniform', 'mask', {told}" in line
    assert line.endswith(" (lightning fit --help shows all options)")


def test_a_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        answer_at_once(["fitt"])
    assert capsys.readouterr().err == (
        f"error: no subcommand 'fitt'; did you mean fit? there are {', '.join(SUBCOMMANDS)} "
        "(lightning --help shows all options)\n"
    )


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--dtpe=x"], "unknown option --dtpe; did you mean --dtype?"),
        (["make", "--sted=3"], "unknown option --sted; did you mean --steps?"),
        (["make", "--step=3"], "unknown option --step; did you mean --steps?"),  # no abbreviations
        (["--dtype"], "argument --dtype: expected one argument"),
        (["mak"], "argument command: invalid choice: 'mak' (choose from 'make')"),
    ],
)
def test_tools(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ToolParser(prog="tool.py", description="Two\nlines")
    parser.add_argument("--dtype")
    parser.add_subparsers(dest="command").add_parser("make").add_argument("--steps", type=int)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(args)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        end.value.code == 2
        and line.startswith(f"error: {told} (tool.py")
        and line.endswith(" --help shows all options)")
    )
    assert "Two\nlines" in parser.format_help()


def test_every_tool_explains_itself_so() -> None:
    assert not [path.name for path in (REPO / "tools").glob("*.py") if "argparse.ArgumentParser(" in path.read_text()]


def test_argparses_internals() -> None:
    """``options_of`` reads them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output")
    parser.add_subparsers().add_parser("sub").add_argument("--deep")
    assert options_of(parser) == {"-h", "--help", "-o", "--output", "--deep"}


def test_a_configuration_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no folder ``configs``; a file that is there comes first."""
    monkeypatch.chdir(tmp_path)
    for name in ("recall.yaml", "configs/recall.yaml"):
        assert Path(find_config(name)) == CONFIGS / "recall.yaml" == REPO / "configs/recall.yaml"
    Path("recall.yaml").touch()
    assert find_config("recall.yaml") == "recall.yaml"
    with pytest.raises(SystemExit):
        find_config("other/recall.yaml")


def test_a_missing_model_says_what_makes_it(tmp_path: Path) -> None:
    folder = tmp_path / "my_model"
    with pytest.raises(
        CheckpointError, match=rf"{folder}: no such model; make it with: python tools/convert.py pipeline"
    ):
        UniViGUPipeline.from_pretrained(folder)
    with pytest.raises(DataError, match=r"tools/synthesize.py makes shards"):
        list_shards(tmp_path / "clips")


def test_a_missing_foundation_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir .*Diffusers$"
    ):
        Foundation(tmp_path / "Wan2.1-T2V-1.3B-Diffusers")


def test_a_text_longer_than_the_slot_is_named_before_training(
    in_tmp: Path, small_data: list[str], failing: Callable[[list[str]], str]
) -> None:
    """And not when its batch comes, which may be after hours."""
    printed = failing(["fit", "--config=configs/recall.yaml", *small_data, "--stages.recall.text_length=8"])
    assert "stages.recall.text_length=8: the longest prompt of the data has" in printed
    assert not Path("runs/recall/checkpoints").exists()
