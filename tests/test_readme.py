"""What the README and the docs tell people to type does exist."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

import pytest

from tests.conftest import REPO, parse_command
from univigu.models.weights import CheckpointError

GUIDES = sorted((REPO / "docs").glob("*.md"))
DOCS = [REPO / "README.md", REPO / "CONTRIBUTING.md", *GUIDES]  # docs/experiments shows commands of earlier commits


def commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCS:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.S):
            found += [(path.name, line) for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return found


def test_the_readme_starts_with_its_two_commands() -> None:
    lines = [line for name, line in commands() if name == "README.md"]
    assert lines[0].endswith(".venv/bin/lightning fit --config configs/two_stage.yaml --config configs/frozen.yaml")
    assert lines[1].endswith(".venv/bin/python -m pytest")
    script = (REPO / ".ci/run").read_text()
    for part in lines[1].split(" && "):
        assert part.replace("pip install", "pip install -q") in script or part in script


@pytest.mark.slow
def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.S)
    exec(code, {})
    assert "a small blue ring" in capsys.readouterr().out


def test_guide_pages_are_short_and_links_lead_somewhere() -> None:
    long = {path.name: lines for path in GUIDES if (lines := len(path.read_text().splitlines())) > 150}
    assert not long and len((REPO / "README.md").read_text().splitlines()) <= 120
    for path in (*DOCS, *(REPO / "docs" / "experiments").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize(
    ("where", "line"),
    [pytest.param(*found, marks=[] if found[0] == "README.md" else pytest.mark.slow) for found in commands()],
    ids=lambda value: value[:60],
)
def test_commands_parse(where: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    for part in line.split(" && "):
        words = shlex.split(part)
        program, args = Path(words[0]).name, words[1:]
        if program in ("lightning", "univigu"):
            _check_lightning(args)
        elif program == "torchrun":
            assert "univigu.cli" in args
            _check_lightning(args[args.index("univigu.cli") + 1 :])
        elif program.startswith("python") and args and args[0].startswith("tools/"):
            _check_tool(args, monkeypatch)
        else:
            assert program in ("python3", "python", "pip", "npm", "tensorboard", "source", "hf")


def _check_lightning(args: list[str]) -> None:
    try:
        parse_command(args)
    except CheckpointError as error:  # of a training that has not been run here; the options are right by then
        assert args[0] in ("test", "validate") and "lightning fit --config" in str(error)


def _check_tool(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool's own parser accepts the options."""

    class Parsed(Exception):
        pass

    tool = import_module(f"tools.{Path(args[0]).stem}")
    passes_on = "parse_known_args" in Path(str(tool.__file__)).read_text()  # further options go to lightning fit
    name = "parse_known_args" if passes_on else "parse_args"
    original = getattr(ArgumentParser, name)

    def parse(self: ArgumentParser, words: list[str], *rest: object) -> None:
        monkeypatch.setattr(ArgumentParser, name, original)  # subparsers use it, too
        raise Parsed(original(self, words, *rest))

    monkeypatch.setattr(ArgumentParser, name, parse)
    with pytest.raises(Parsed):
        tool.main(args[1:])
