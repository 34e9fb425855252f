"""The wheel works outside of a clone; what builds, checks and publishes the project says what the tests say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPO
from univigu.data.video import encode_mp4
from univigu.shapes.renderer import render
from univigu.shapes.scenes import sample_scene

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


def test_every_package_is_in_the_wheel() -> None:
    found = {".".join(path.parent.relative_to(REPO).parts) for path in (REPO / "univigu").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"univigu.configs"}


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(tmp_path: Path, small_data: list[str]) -> None:
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    for name in ("univigu", "configs"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}", source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = [path.relative_to(REPO / "univigu") for path in (REPO / "univigu/assets").rglob("*.*")]
    shipped += [path.relative_to(REPO) for path in (REPO / "configs").iterdir()]
    assert {f"univigu/{path}" for path in shipped} <= set(zipfile.ZipFile(wheel).namelist())
    subprocess.run([*pip, "install", "--no-deps", f"--target={site}", wheel], check=True)
    work.mkdir()
    (work / "clip.mp4").write_bytes(encode_mp4(render(sample_scene(0), 64, 64, 9), 8))
    data = [arg for arg in small_data if arg.startswith("--data.")]
    few = ["--model.sampling.caption_steps=2", "--trainer.max_steps=1", "--report.num_samples=1"]
    commands = [
        ["predict", "--config=caption.yaml", "--data.videos=clip.mp4", "--data.num_workers=0"],
        ["fit", "--config=recall.yaml", "--config=configs/frozen.yaml", *data, *few],
    ]
    code = f"from univigu import cli; print(cli.__file__)\nfor args in {commands!r}: cli.main(args)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith(str(site)), run.stdout + run.stderr
    assert "arn" not in run.stderr.replace("learning", ""), run.stderr  # no warning that nobody can act on
    assert "\nfit recall: 1/1, " in run.stderr and "\npredict caption: 1/1" in run.stderr
    (row,) = map(json.loads, (work / "runs/caption/captions.jsonl").read_text().splitlines())
    assert "circle" in row["caption"] or "video shows" in row["caption"], row
    assert (work / "runs/recall/checkpoints/last.ckpt").is_file()
