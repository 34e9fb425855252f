"""What the command line answers at once: help, the version and a misspelt subcommand, with nothing heavy imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lightning.pytorch.cli import LightningCLI

from tests.conftest import REPO
from univigu import __version__
from univigu.cli import SUBCOMMANDS, answer_at_once, main

HEAVY = {"torch", "lightning", "diffusers", "transformers", "numpy", "jsonargparse"}


def run(*args: str) -> tuple[int, str, set[str]]:
    """Exit code, what was printed, and which of the heavy packages were imported for it."""
    code = (
        "import sys, atexit; from univigu.cli import main; "
        f"atexit.register(lambda: print('HEAVY', *sorted({HEAVY!r} & set(sys.modules)))); main({list(args)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    text, _, heavy = result.stdout.rpartition("HEAVY")
    return result.returncode, text + result.stderr, set(heavy.split())


@pytest.mark.parametrize("args", [["--help"], ["-h"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code, text, heavy = run(*args)
    assert (code, heavy) == (0, set())
    for name, meaning in SUBCOMMANDS.items():
        assert name in text and meaning.split()[0] in text


def test_version() -> None:
    code, text, heavy = run("--version")
    assert (code, text.strip(), heavy) == (0, f"univigu {__version__}", set())


@pytest.mark.parametrize(("args", "told"), [([], "expected a subcommand"), (["fitt"], "no subcommand 'fitt'")])
def test_no_subcommand_of_ours(args: list[str], told: str) -> None:
    code, text, heavy = run(*args)
    assert (code, heavy) == (2, set())
    assert told in text and "fit, validate, test, predict" in text


def test_the_subcommands_are_lightnings() -> None:
    assert set(SUBCOMMANDS) == {*LightningCLI.subcommands(), "demo"}


@pytest.mark.parametrize("args", [["fit", "--help"], ["fit"], ["--config", "x.yaml", "fit"], ["predict", "--version"]])
def test_everything_else_is_for_the_full_parser(args: list[str]) -> None:
    answer_at_once(args)  # returns


@pytest.mark.slow
def test_processes_that_load_data_need_no_diffusers() -> None:
    """Every worker process imports it anew, which with diffusers takes seconds."""
    code = "import sys, univigu.data.engine, univigu.data.inputs, univigu.data.loader; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert not {"diffusers", "lightning", "peft"} & set(result.stdout.split())


@pytest.mark.slow
def test_help_explains_the_fields_of_dataclasses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "Projections of the text." in " ".join(capsys.readouterr().out.split())
