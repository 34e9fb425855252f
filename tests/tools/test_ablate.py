"""The sweep: what it trains, what it repeats, what it writes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

TOOL = Path(__file__).resolve().parents[2] / "tools" / "ablate.py"
ablate = SimpleNamespace(**runpy.run_path(str(TOOL)))


def fake_run(folder: Path, curve: dict[int, float], name: str, seed: int, **settings: Any) -> None:
    """A finished run with a given learning curve."""
    folder = folder / f"{name}-{seed}"
    folder.mkdir(parents=True)
    columns = [f"val/caption/{key}" for key in ("mean", *ablate.ATTRIBUTES)]
    columns += [f"val/{key}/mean" for key in ablate.CONDITIONS if key != "caption"]
    rows = [["step", "train/loss", *columns], ["0", "3.0", *[""] * len(columns)]]
    rows += [[str(step), "", *[str(value)] * len(columns)] for step, value in curve.items()]
    (folder / "metrics.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    settings = {"steps": 300, "every": 100, "clips": 64, "caption_steps": 8, "overrides": []} | settings
    (folder / "done").write_text(json.dumps({"seconds": 1, "settings": settings}))


def test_a_short_sweep_trains_reports_and_is_not_repeated(
    in_tmp: Path, small_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--only", "recipe", "shared", "--seeds", "1", "--steps", "2", "--every", "2", "--clips", "4",
        "--caption-steps", "2", "--jobs", "2", *small_data,
    ]  # fmt: skip
    assert ablate.main(arguments) == 0
    text = Path("docs/RESULTS.md").read_text()
    assert "| text FFN (recipe: separate) | shared, trained |" in text and "never" in text
    assert {path.name for path in Path("docs/results").iterdir()} == {"architecture.png"}
    config = yaml.safe_load(Path("runs/ablate/shared-0/config.yaml").read_text())
    assert config["model"]["architecture"]["separate_text_ffn"] is False
    before = Path("runs/ablate/recipe-0/metrics.csv").stat().st_mtime_ns
    assert ablate.main(arguments) == 0
    assert Path("runs/ablate/recipe-0/metrics.csv").stat().st_mtime_ns == before


def test_a_failed_run_is_named_and_the_others_go_on(
    in_tmp: Path, small_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = "--model.no_such_option=1"
    settings = {"steps": 800, "every": 100, "clips": 128, "caption_steps": 20, "overrides": [wrong]}
    fake_run(Path("runs/ablate"), {100: 0.5}, "random", 0, **settings)
    arguments = ["--only", "recipe", "random", "--seeds", "1", wrong]
    assert ablate.main(arguments) == 2
    assert "recipe-0 failed" in capsys.readouterr().err
    assert "no_such_option" in Path("runs/ablate/recipe-0/log.txt").read_text()
    assert "| random, trained | 50.0 |" in Path("docs/RESULTS.md").read_text()


def test_numbers_of_the_tables(in_tmp: Path) -> None:
    curves = {"recipe": [{100: 0.5, 200: 0.9}, {100: 0.95, 200: 1.0}], "random": [{100: 0.2, 200: 0.3}] * 2}
    for name, seeds in curves.items():
        for seed, curve in enumerate(seeds):
            fake_run(Path("runs"), curve, name, seed)
    document = Path("RESULTS.md")
    document.write_text(f"# Mine\n\nabove\n\n{ablate.BEGIN}\nold\n{ablate.END}\n\nbelow\n")
    assert ablate.main(["--report", "--output", "runs", "--document", "RESULTS.md", "--seeds", "2"]) == 0
    text = document.read_text()
    assert "300 steps of recall, 2 seeds, 64 held-out clips" in text and "(8 denoising steps)" in text  # as it was made
    assert text.startswith("# Mine\n\nabove\n\n") and text.endswith("\n\nbelow\n") and "old" not in text
    recipe, random = (line for line in text.splitlines() if "±" in line and "steps" not in line and line.count("|") > 9)
    assert "95.0 ± 7.1" in recipe and recipe.endswith("| 100, 100 | 200, 100 | 200, 100 |")
    assert "30.0 ± 0.0" in random and random.endswith("| never, never | never, never | never, never |")
    assert Path("results/initialisation.png").stat().st_size > 10_000


def test_runs_of_two_kinds_are_not_mixed(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_run(Path("runs"), {100: 0.5}, "recipe", 0)
    assert ablate.main(["--output", "runs", "--seeds", "1", "--only", "recipe", "--steps", "400"]) == 2
    assert "recipe-0: made with steps=300, asked for is 400; remove it or give another" in capsys.readouterr().err
    fake_run(Path("runs"), {100: 0.5}, "random", 0, clips=32)
    assert ablate.main(["--output", "runs", "--report"]) == 2
    assert "random-0: made with clips=32, asked for is 64" in capsys.readouterr().err
    assert not Path("docs").exists()


def test_the_recipes_sampling_is_kept() -> None:
    base = ablate.read_configuration(TOOL.parents[1] / "configs" / "recall.yaml")
    options = ablate.parse(["--config", str(TOOL.parents[1] / "configs" / "recall.yaml"), "--caption-steps", "7"])
    config = ablate.configuration(base, ablate.Run("recipe", 0, Path("x")), options)
    assert config["model"]["sampling"] == base["model"]["sampling"] | {"caption_steps": 7}


def test_a_document_without_markers_is_left_alone(in_tmp: Path) -> None:
    fake_run(Path("runs"), {100: 0.5}, "recipe", 0)
    Path("R.md").write_text("mine")
    with pytest.raises(ValueError, match="lacks the lines"):
        ablate.main(["--report", "--output", "runs", "--document", "R.md"])
    assert Path("R.md").read_text() == "mine"


def test_nothing_to_report(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main(["--report", "--output", "nowhere"]) == 2
    assert "no finished run" in capsys.readouterr().err
