"""The report of a run, and the document that its scores are written into."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.conftest import REPO

tool = SimpleNamespace(**runpy.run_path(str(REPO / "tools" / "report.py")))
PLACE = f"{tool.BEGIN}\n{tool.END}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was tested and of which no curve is left."""
    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer.add_scalar("test/caption/shape", 0.875, 3)
    return tmp_path / "run"


def report(run: Path, document: Path) -> int:
    page = run.parent / "new" / "page.html"
    return tool.main(["--run", str(run), "--output", str(page), "--document", str(document)])


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", " no line end"])
def test_a_document_without_markers_gets_a_section_at_its_end(run: Path, tmp_path: Path, ending: str) -> None:
    document = tmp_path / "RESULTS.md"
    kept = f"# Results\n\n| a | table |\n|---|---|\n| 1 | 2 |{ending}"
    document.write_text(kept)
    assert report(run, document) == 0
    text = document.read_text()
    assert text.startswith(kept) and "\n\n## Runs\n\n" in text and text.endswith(f"{tool.END}\n")
    assert text.index(tool.BEGIN) < text.index("| caption | 87.5 |") < text.index(tool.END)
    assert report(run, document) == 0
    assert document.read_text() == text  # once it has its place it is filled anew


@pytest.mark.parametrize(
    "text", [f"{tool.BEGIN}\n", f"{tool.END}\n", f"{tool.END}\n{tool.BEGIN}\n", f"{PLACE}\nbetween\n{PLACE}\nlast\n"]
)
def test_what_cannot_be_told_apart_is_left_as_it_is(
    run: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "RESULTS.md"
    document.write_text(text)
    assert report(run, document) == 2
    assert f"{document}: expected the lines" in capsys.readouterr().err
    assert document.read_text() == text and not (tmp_path / "new").exists()


def test_a_document_that_is_not_there(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(run, tmp_path / "nowhere.md") == 2
    assert "nowhere.md" in capsys.readouterr().err and not (tmp_path / "nowhere.md").exists()


def test_curves_without_matplotlib_name_the_extra(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it then fails as where it is not installed
    arguments = ["--run", str(run), "--output", str(tmp_path / "new" / "page.html")]
    assert tool.main(arguments) == 0  # a run without curves needs none
    (tmp_path / "new" / "page.html").unlink()
    with SummaryWriter(str(run / "more")) as writer:
        for step in range(2):
            writer.add_scalar("train/loss", 1.0, step)
    assert tool.main(arguments) == 2
    assert 'pip install -e ".[results]"' in capsys.readouterr().err and not list((tmp_path / "new").iterdir())
