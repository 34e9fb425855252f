"""The wheel works outside of a clone; what builds, checks and publishes the project says what the tests say."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO, parse_command
from tests.test_style import STYLE
from univigu.data.video import encode_mp4
from univigu.shapes.renderer import render
from univigu.shapes.scenes import sample_scene

COPIED = re.findall(r"\S+", " ".join(re.findall(r"^COPY (.*) \S+$", (REPO / "Dockerfile").read_text(), re.M)))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


def test_every_package_is_in_the_wheel() -> None:
    found = {".".join(path.parent.relative_to(REPO).parts) for path in (REPO / "univigu").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"univigu.configs"}


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(tmp_path: Path, small_data: list[str]) -> None:
    """Built from the source distribution of what the Dockerfile copies."""
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    source.mkdir()
    for name in COPIED:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPO / name, source)
    sdist = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", sdist], cwd=source, check=True, capture_output=True)
    pip, options = [sys.executable, "-m", "pip", "--quiet"], ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, f"--wheel-dir={tmp_path}", *tmp_path.glob("*.tar.gz")], check=True)
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


# ---------------------------------------------------------------- the other files


def test_dockerfile() -> None:
    text = (REPO / "Dockerfile").read_text()
    ignored = (REPO / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and {line[1:] for line in ignored if line.startswith("!")} == set(COPIED)
    torch = next(line for line in PROJECT["project"]["dependencies"] if line.startswith("torch>"))
    assert "ARG TORCH=cpu" in text and f'whl/${{TORCH}}" "{torch}"' in text
    assert f'ENTRYPOINT ["{next(iter(PROJECT["project"]["scripts"]))}"]' in text
    if hadolint := shutil.which("hadolint"):
        subprocess.run([hadolint, "-"], input=text, text=True, check=True)


def test_hooks_before_a_commit_are_the_tests_of_style() -> None:
    (repository,) = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    checks = {hook["entry"].removesuffix(" --fix") for hook in repository["hooks"]}
    tested = {" ".join(command[:2]) for command in STYLE}
    assert checks == tested == {"ruff check", "ruff format", "mypy"}


def test_workflows() -> None:
    tests, release = (yaml.safe_load((REPO / f".github/workflows/{n}.yml").read_text()) for n in ("tests", "release"))
    assert {"run": ".ci/run"} in tests["jobs"]["tests"]["steps"] and os.access(REPO / ".ci/run", os.X_OK)
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key "on" as true
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}  # no stored token
    assert tests["permissions"] == release["permissions"] == {"contents": "read"} and "permissions" not in build
    script = "\n".join(step.get("run", "") for step in build["steps"])
    assert "python -m build" in script and "twine check --strict" in script
    command = next(line.strip() for line in script.splitlines() if line.strip().startswith("lightning predict"))
    parse_command(shlex.split(command)[1:])
