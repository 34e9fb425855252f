"""The mutants themselves: each still changes what it means to, and one that nobody notices is told."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPO

sys.path.insert(0, str(REPO / "tools"))
import mutate

SHIFT = next(mutant for mutant in mutate.MUTANTS if mutant.what == "shift's denominator")


@pytest.mark.parametrize("mutant", mutate.MUTANTS, ids=lambda mutant: mutant.what)
def test_every_mutant_is_another_program(mutant: Any, tmp_path: Path) -> None:
    file = tmp_path / mutant.file
    file.parent.mkdir(parents=True)
    shutil.copy(REPO / "univigu" / mutant.file, file)
    before = mutate.mutate(mutant, tmp_path)
    assert before == (REPO / "univigu" / mutant.file).read_text()
    broken = file.read_text()
    assert compile(broken, mutant.file, "exec").co_code is not None and broken != before
    assert all((REPO / test).exists() for test in mutant.tests.split())


def test_what_is_asked_for_is_covered() -> None:
    areas = [mutant.area for mutant in mutate.MUTANTS]
    assert {"model", "flow", "cache", "resume"} <= set(areas)
    assert len({mutant.what for mutant in mutate.MUTANTS}) == len(areas)


def test_a_mutant_that_has_moved_on_is_named(tmp_path: Path) -> None:
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "time.py").write_text("rewritten = True\n")
    with pytest.raises(ValueError, match=r"univigu/flow/time.py: .* stands there 0 times"):
        mutate.mutate(SHIFT, tmp_path)


@pytest.mark.slow
def test_the_noticed_and_the_unnoticed_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {name: getattr(SHIFT, name) for name in ("file", "right", "tests")}
    harmless = mutate.Mutant("flow", "nothing at all", wrong=f"{SHIFT.right}  # the same", **values)
    monkeypatch.setattr(mutate, "MUTANTS", (SHIFT, harmless))
    document = tmp_path / "mutants.md"
    assert mutate.main(["--jobs", "1", "--document", str(document)]) == 1
    assert "1 of 2 mistakes noticed" in capsys.readouterr().out
    rows = document.read_text().splitlines()
    assert rows[-2].endswith("| noticed |") and rows[-1].endswith("| NOT noticed |")
