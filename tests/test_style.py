"""Linting and types are part of what passes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import REPO

STYLE = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]


@pytest.mark.parametrize(
    "command", [pytest.param(s, marks=[pytest.mark.slow] if s == ["mypy"] else []) for s in STYLE], ids=" ".join
)
def test_clean(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(REPO)): lines
        for folder in ("univigu", "tools")
        for path in (REPO / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_tools_start_as_scripts() -> None:
    """``python tools/x.py`` has tools/ on its path, not the repository."""
    assert not [
        path.name
        for path in (REPO / "tools").glob("*.py")
        if re.search(r"^(from|import) tools", path.read_text(), re.M)
    ]
