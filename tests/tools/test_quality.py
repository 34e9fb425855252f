"""The table of edits: what is changed, what is counted, and a run on a small untrained model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import quality
from univigu.pipeline import UniViGUPipeline
from univigu.shapes import scenes
from univigu.shapes.texts import prompt_of


def test_one_thing_changes_and_nothing_else() -> None:
    for seed in range(20):
        scene = scenes.sample_scene(seed, "test")
        for attribute in quality.EDITED:
            other, *words = quality.changed(scene, attribute, seed)
            assert prompt_of(scene).replace(*words, 1) == prompt_of(other)
            assert (other, *words) == quality.changed(scene, attribute, seed)
            before, after = scene.to_dict(), other.to_dict()
            place = [(before, after)] if attribute == "background" else [(before["objects"][0], after["objects"][0])]
            ((old, new),) = place
            assert old[attribute] != new[attribute]
            new[attribute] = old[attribute]
            assert before == after
            colors = [obj.color for obj in other.objects]
            assert len(set(colors)) == len(colors)


@pytest.mark.slow
def test_it_runs(untrained_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--clips", "1", "--prompts", "true", "--num-inference-steps", "1", "--strength", "0.3", "1"]
    assert quality.main(["edit", "--model", untrained_model, *small]) == 0
    out = capsys.readouterr().out
    assert all(f"│ {name:10} │ {strength:8} │" in out for name in quality.EDITED for strength in ("0.3", "1"))
    # the shipped generator does edit: colours and backgrounds of a few clips at full strength
    pipe = UniViGUPipeline.from_pretrained(untrained_model)
    pipe.set_progress_bar_config(disable=True)
    drawn = [scenes.sample_scene(seed, "test") for seed in range(12)]
    shown, kept, _ = quality.edit_row(pipe, drawn, list(map(prompt_of, drawn)), "background", 1.0, 12)
    assert shown == 1.0 and kept > 0.8
    none, _, _ = quality.edit_row(pipe, drawn[:4], list(map(prompt_of, drawn[:4])), "background", 0.05, 40)
    assert none == 0  # too weak to change anything


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert quality.main(["edit", "--model", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert quality.main(["edit", "--model", "x", "--clips", "0"]) == 2
    assert "--clips 0" in capsys.readouterr().err
