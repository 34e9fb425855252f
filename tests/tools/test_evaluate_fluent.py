"""Judging emoji by their texts, the nearest true clip and another model."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests.tools.test_prepare_fluent import write_package
from tools import evaluate_fluent as tool
from tools import prepare_fluent

PEOPLE = {"man judge": {"role": "judge", "gender": "man"}, "cake": {"role": "", "gender": ""}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("man judge with medium-light skin, on a pink background", ("judge", "man", "medium-light", "pink")),
        (
            "The animation shows a man judge with dark skin in front of a plain blue background. it",
            ("judge", "man", "dark", "blue"),
        ),
        ("cake, on a white background", ("", "", "", "white")),
        ("man judge with dark skin, on a", ("", "", "", "")),
        ("woman judge, on a red background", ("", "", "", "red")),
    ],
)
def test_texts_tell_the_attributes(text: str, expected: tuple[str, ...]) -> None:
    found = tool.read_text(text, PEOPLE)
    assert tuple(found[name] for name in ("role", "gender", "tone", "background")) == expected


def test_only_attributes_that_a_clip_has_are_counted() -> None:
    judge = {"name": "man judge", "role": "judge", "gender": "man", "tone": "dark", "background": "red"}
    cake = {"name": "cake", "role": "", "gender": "", "tone": "", "background": "red"}
    light = {**judge, "tone": "light"}
    assert tool.accuracy([light, cake], [judge, cake]) == {
        **{"name": 100.0, "role": 100.0, "gender": 100.0, "tone": 0.0, "background": 100.0, "all": 0.0}
    }
    assert tool.accuracy([cake, judge], [judge, cake])["name"] == 0.0
    clips = [tool.Clip(torch.zeros(0), {}, judge), tool.Clip(torch.zeros(0), {}, light)]
    assert 40 < tool.chance([judge] * 20, clips)["tone"] < 60


@pytest.mark.slow
def test_every_task_is_judged(tmp_path: Path, untrained_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    judges = [f"{base}-{tone}-200d-2696-fe0f" for base in ("1f468", "1f469") for tone in prepare_fluent.TONES]
    surfers = [f"1f3c4-{tone}-200d-{sign}-fe0f" for sign in ("2642", "2640") for tone in prepare_fluent.TONES]
    package, data, out = write_package(tmp_path, judges + surfers), str(tmp_path / "data"), tmp_path / "out"
    command = [str(package), "--output", data, "--num-frames", "9"]
    assert prepare_fluent.main([*command, "--backgrounds", "2"]) == 0
    command = [data, "--model", untrained_model, "--judge", f"{untrained_model}/", "--output", str(out), "--clips", "2"]
    command += ["--prompt-length", "64", "--steps", "2"]
    assert tool.main(command) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["caption", "generate", "joint", "edit", "answer"]
    for row in ("captions, held-out triples", "captions of the judge, held-out triples"):
        assert results["caption"][row]["all"] == 0.0  # they have not been trained
    for kind in ("trained triples", "held-out triples"):
        assert f"videos, {kind}: nearest clip, latents" in results["generate"]
    assert set(results["answer"]["answers, held-out triples"]) == {"background", "name", "motion", "tone", "gender"}
    before = capsys.readouterr().out
    assert tool.main([*command, "--tasks", "caption"]) == 0  # read from the file
    assert capsys.readouterr().out in before

    options = {"data": Path(data), "model": untrained_model, "judge": None, "size": "64x64x9", "steps": 2, "clips": 4}
    evaluation = tool.Evaluation(Namespace(**options))
    clips = evaluation.clips["train"]
    for _, found in evaluation.nearest(tool.videos_of(clips)):
        assert [shown["background"] for shown in found] == [clip.shown["background"] for clip in clips]
