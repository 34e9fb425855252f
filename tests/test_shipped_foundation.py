"""The foundation that ships: its size, that diffusers runs it as it is, and that its samples show what was asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from tests.shapes.chance import chance_levels
from univigu.data.video import encode_mp4, read_video, to_frames, to_model_range
from univigu.models.encode import Conventions, encode_clips, encode_prompts
from univigu.models.foundation import Foundation
from univigu.models.tokens import tokenize
from univigu.shapes.metrics import AttributeAccuracy, agreement, reading_of, score
from univigu.shapes.renderer import render
from univigu.shapes.scenes import sample_scene
from univigu.shapes.texts import prompt_of
from univigu.shapes.video_checker import detect


def test_it_is_small(foundation: str) -> None:
    size = sum(path.stat().st_size for path in Path(foundation).rglob("*") if path.is_file())
    assert size <= 12 * 2**20


@pytest.mark.slow
@torch.no_grad()
def test_its_vae_keeps_what_matters(foundation: str) -> None:
    vae = Foundation(foundation).vae
    scenes = [sample_scene(seed, "test") for seed in range(40)]
    clips = torch.stack([read_video(encode_mp4(render(scene)), 9, 64, 64) for scene in scenes])
    decoded, metric = (
        to_frames(Conventions().decode(vae, encode_clips(vae, to_model_range(clips)))),
        AttributeAccuracy(),
    )
    metric.update([score(detect(clip), scene) for clip, scene in zip(decoded, scenes, strict=True)])
    results = metric.compute()
    for name in ("count", "background", "size", "color", "motion", "speed", "relation", "start", "end"):
        assert results[name] >= 0.95, (name, results[name])
    assert results["shape"] >= 0.9


@pytest.mark.slow
def test_diffusers_runs_it_and_samples_show_what_was_asked(foundation: str) -> None:
    """Held-out prompts through WanPipeline itself, with its default slot of 512 tokens."""
    pipeline = WanPipeline.from_pretrained(foundation)
    pipeline.set_progress_bar_config(disable=True)
    scenes = [sample_scene(seed, "val") for seed in range(16)]
    video = pipeline(
        prompt=[prompt_of(scene) for scene in scenes], height=64, width=64, num_frames=9, num_inference_steps=12,
        guidance_scale=2.0, generator=[torch.Generator().manual_seed(i) for i in range(16)], output_type="pt",
    ).frames  # fmt: skip
    frames = (video * 255).round().to(torch.uint8)
    assert frames.shape == (16, 9, 3, 64, 64)
    metric, shuffled = AttributeAccuracy(), AttributeAccuracy()
    shown, asked = list(map(detect, frames)), [reading_of(scene, "prompt") for scene in scenes]
    metric.update(map(agreement, asked, shown))
    shuffled.update(map(agreement, asked[1:] + asked[:1], shown))  # negative control: other scenes' truth
    results, control, chance = metric.compute(), shuffled.compute(), chance_levels("video")
    print({name: round(float(value), 3) for name, value in results.items()})
    for name in ("count", "background", "color", "size", "motion", "speed", "relation"):
        assert results[name] >= 0.85, (name, results[name])
    assert results["shape"] >= 0.6
    assert control["mean"] < chance["mean"] + 0.15


@torch.no_grad()
def test_its_text_encoder_knows_whose_word_it_is(foundation: str) -> None:
    """A linear read-out tells first objects' words from second ones' in held-out prompts: whose colour is "red"?"""
    parts = Foundation(foundation)

    def words(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scenes = [sample_scene(seed, "val") for seed in range(start, start + count)]
        scenes = [scene for scene in scenes if len(scene.objects) == 2]
        ids = tokenize(parts.tokenizer, [prompt_of(scene) for scene in scenes], 32)
        embeds = encode_prompts(parts.text_encoder, ids, parts.pad_token_id)
        found = [(embeds[i][ids[i] == parts.tokenizer.convert_tokens_to_ids(f"▁{obj.color}")][0], which)
                 for i, scene in enumerate(scenes) for which, obj in enumerate(scene.objects)]  # fmt: skip
        return torch.stack([embed for embed, _ in found]), torch.tensor([which for _, which in found])

    (train, truth), (held, expected) = words(0, 300), words(1000, 100)
    add = torch.nn.functional.pad
    weights = torch.linalg.lstsq(add(train, (0, 1), value=1.0), 2.0 * truth[:, None] - 1).solution
    read = (add(held, (0, 1), value=1.0) @ weights)[:, 0] > 0
    assert (read == expected.bool()).float().mean() >= 0.98


@pytest.mark.parametrize("missing", ["vae", "tokenizer"])
def test_an_incomplete_folder_is_named(missing: str, foundation: str, tmp_path: Path) -> None:
    for part in Path(foundation).iterdir():
        if part.name != missing:
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(FileNotFoundError, match=missing):
        Foundation(tmp_path)
