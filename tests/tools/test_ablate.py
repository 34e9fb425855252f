"""The sweep: what it trains, what it repeats, what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import parse_command
from tools import ablate

OPTIONS = ["--output=runs", "--steps=300", "--clips=64", "--caption-steps=8", "--only", "recipe", "random"]


def fake_run(curve: dict[int, float], name: str, seed: int, *options: str) -> None:
    """A finished run with a given learning curve, made with ``OPTIONS`` and others."""
    folder = Path("runs", f"{name}-{seed}").resolve()
    folder.mkdir(parents=True)
    columns = [f"val/caption/{key}" for key in ("mean", *ablate.ATTRIBUTES)]
    columns += [f"val/{key}/mean" for key in ablate.PROMPTED]
    rows = [["step", "train/loss", *columns], ["0", "3.0", *[""] * len(columns)]]
    rows += [[str(step), "", *[str(value)] * len(columns)] for step, value in curve.items()]
    (folder / "metrics.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    made = ablate.plan(name, seed, ablate.parse([*OPTIONS, *options]))
    made.done.write_text(json.dumps(made.options))


@pytest.mark.slow
def test_a_short_sweep_trains_reports_and_is_not_repeated(
    in_tmp: Path, small_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--only", "ffn", "--seeds=1", "--steps=2", "--every=2", "--clips=4", "--caption-steps=2", *small_data]
    assert ablate.main(arguments) == 0
    text = Path("runs/ablate/tables.md").read_text()
    assert "| text FFN (recipe: separate) | shared, trained |" in text and "never" in text
    curves = Path("runs/ablate/ffn-0/metrics.csv")
    before = curves.stat().st_mtime_ns
    assert ablate.main(arguments) == 0
    assert curves.stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        ablate.main([*arguments, "--no_such_option=1", "--output=runs/other"])
    assert "no_such_option" in capsys.readouterr().err and not Path("runs/other/ffn-0/done").exists()


@pytest.mark.parametrize(
    "variant", ["recipe", *(pytest.param(name, marks=pytest.mark.slow) for name in ablate.VARIANTS if name != "recipe")]
)
def test_every_variant_is_an_option_of_fit(variant: str, tmp_path: Path) -> None:
    parse_command(["fit", *ablate.plan(variant, 0, ablate.parse(["--output", str(tmp_path)])).options])


def test_numbers_of_the_table(in_tmp: Path) -> None:
    curves = {"recipe": [{100: 0.5, 200: 0.9}, {100: 0.95, 200: 1.0}], "random": [{100: 0.2, 200: 0.3}] * 2}
    for name, seeds in curves.items():
        for seed, curve in enumerate(seeds):
            fake_run(curve, name, seed)
    assert ablate.main([*OPTIONS, "--seeds=2"]) == 0
    text = Path("runs/tables.md").read_text()
    assert "300 steps of recall, 2 seeds, 64 held-out clips" in text and "(8 denoising steps)" in text
    recipe, random = (line for line in text.splitlines() if "±" in line and "steps" not in line and line.count("|") > 9)
    assert "95.0 ± 7.1" in recipe and recipe.endswith("| 100, 100 | 200, 100 | 200, 100 |")
    assert "30.0 ± 0.0" in random and random.endswith("| never, never | never, never | never, never |")


def test_runs_with_other_settings_are_not_mixed(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_run({100: 0.5}, "recipe", 0)
    assert ablate.main([*OPTIONS, "--seeds=1", "--steps=400"]) == 2
    told = "recipe-0: made with --stages.recall.steps=300, asked for is --stages.recall.steps=400; remove it or give"
    assert told in capsys.readouterr().err
    fake_run({100: 0.5}, "random", 0, "--model.vae_tiling=true")
    assert ablate.main([*OPTIONS, "--seeds=1"]) == 2
    assert "random-0: made with --model.vae_tiling=true, asked for is fewer options" in capsys.readouterr().err
    assert not Path("runs/tables.md").exists()
    assert ablate.main([*OPTIONS, "--seeds=0"]) == 2 and "--seeds 0" in capsys.readouterr().err
