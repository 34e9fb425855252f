"""The docs site builds without a warning, and its table of options is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_every_option_has_a_row(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The options of ``fit --print_config`` except the trainer's and the command's own, each once, and no others."""
    from univigu.cli import main

    with pytest.raises(SystemExit):
        main(["fit", "--config", str(REPO / "configs" / "recall.yaml"), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    config["data"] = config["data"]["init_args"]
    config["stages"] = {"NAME": config["stages"]["recall"]}
    expected = {path for name in GROUPS for path in leaves(config[name], name)}
    page = (site / "reference" / "options.html").read_text()
    rows = re.findall(r"<td><code>([\w.]+)</code></td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>", page)
    named = [row[0] for row in rows]
    assert len(named) == len(set(named)) and all(meaning for *_, meaning in rows)
    unset = ("model.lora.", "data.shards.", "data.buckets.")  # null by default
    assert {name for name in named if not name.startswith(unset)} == expected


GROUPS = ("model", "stages", "data", "checkpoint", "media", "monitor", "report")


def leaves(value: object, path: str) -> list[str]:
    if isinstance(value, dict) and value:
        return [leaf for name, part in value.items() for leaf in leaves(part, f"{path}.{name}")]
    return [path]
