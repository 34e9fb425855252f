"""The tables of samples' quality: what is changed, what is counted, and a run on a small untrained model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tools import quality
from univigu.pipeline import UniViGUPipeline
from univigu.shapes import scenes
from univigu.shapes.texts import prompt_of


def test_one_thing_changes_and_nothing_else() -> None:
    for seed in range(20):
        scene = scenes.sample_scene(seed, "test")
        for attribute in quality.EDITED:
            other = quality.changed(scene, attribute, seed)
            assert quality.rewritten(prompt_of(scene), scene, other) == prompt_of(other)
            assert other == quality.changed(scene, attribute, seed)
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
    common = ["--model", untrained_model, "--clips", "3", "--batch-size", "2"]
    assert quality.main(["steps", *common, "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "│ random     │ 2 " in out and "│ confidence │ 2 " in out
    # the shipped generator does edit: colours and backgrounds of a few clips at full strength
    pipe = UniViGUPipeline.from_pretrained(untrained_model)
    pipe.set_progress_bar_config(disable=True)
    options = Namespace(batch_size=4, num_inference_steps=12, guidance_scale=2.0, prompts="true")
    drawn = [scenes.sample_scene(seed, "test") for seed in range(12)]
    shown, kept, _ = quality.edit_row(pipe, drawn, "background", 1.0, options)
    assert shown == 1.0 and kept > 0.8
    none, _, _ = quality.edit_row(pipe, drawn[:4], "background", 0.05, options)
    assert none < 0.5  # too weak to change anything


def test_what_a_kept_video_costs(untrained_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = UniViGUPipeline.from_pretrained(untrained_model)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    torch.nn.init.normal_(pipe.transformer.text_head.linear.weight, std=0.5)
    for block in pipe.transformer.blocks:
        torch.nn.init.normal_(block.attn1.to_v.weight, std=0.5)  # so that the video does read text
    options = Namespace(batch_size=2, caption_steps=6, refresh=[1, 6])
    drawn = [scenes.sample_scene(seed, "test") for seed in range(3)]
    for reads_text in (True, False):
        pipe.transformer.register_to_config(clean_video_reads_text=reads_text)
        table = quality.refresh(options, pipe, drawn)
        columns = {str(column.header): list(column.cells) for column in table.columns}
        assert columns["k"] == ["1", "1", "6"]
        same = [float(value) for value in columns["tokens as with k = 1"]]
        assert same[:2] == [100.0, 100.0] and (same[2] < 100) == reads_text
        assert ("exactly" in str(table.title)) != reads_text


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert quality.main(["steps", "--model", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert quality.main(["edit", "--model", "x", "--clips", "0"]) == 2
    assert "--clips 0" in capsys.readouterr().err
