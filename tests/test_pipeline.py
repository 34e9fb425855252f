"""The pipeline: one folder in and out, every task from it, and clear words where something does not fit."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import univigu
from univigu.pipeline import UniViGUPipeline
from univigu.sampling.options import SamplingOptions

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parent / "tiny.py")))
convert = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[1] / "tools" / "convert.py")))

SIZE = {"height": 32, "width": 48, "num_frames": 5}
QUICK = {"num_inference_steps": 2, "caption_steps": 2, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def pipe() -> UniViGUPipeline:
    wan = tiny.make_pipeline()
    model = tiny.make_unified(wan.transformer, len(wan.tokenizer), text_flow="mask")
    model.register_to_config(text_length=12)
    components = {name: wan.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    pipe = univigu.UniViGUPipeline(**components, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def videos() -> np.ndarray:
    """Two clips of 7 frames of 32 x 48."""
    return np.random.default_rng(0).random((2, 7, 32, 48, 3), dtype=np.float32)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_calling_it_is_wan_pipeline(pipe: UniViGUPipeline) -> None:
    components = {**pipe.components}
    wan = WanPipeline(**{name: components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")},
                      transformer=components["transformer"])  # fmt: skip
    wan.set_progress_bar_config(disable=True)
    arguments = {**SIZE, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np"}
    frames = [p("a red circle", generator=torch.Generator().manual_seed(3), **arguments).frames for p in (pipe, wan)]
    assert frames[0].shape == (1, 5, 32, 48, 3) and np.array_equal(*frames)


def test_it_survives_saving(pipe: UniViGUPipeline, videos: np.ndarray, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = UniViGUPipeline.from_pretrained(tmp_path)
    assert type(WanPipeline.from_pretrained(tmp_path).transformer) is type(pipe.transformer)
    again.set_progress_bar_config(disable=True)
    for name in ("transformer", "text_encoder", "vae"):
        ours, theirs = (getattr(p, name).state_dict() for p in (pipe, again))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    tokens = [p.caption(videos, generator=seeds(1, 2), **QUICK).tokens for p in (pipe, again)]
    assert torch.equal(*tokens)


def test_captions_of_every_form_of_video(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    tensor = torch.from_numpy(videos).permute(0, 1, 4, 2, 3)
    pil = [pipe.video_processor.numpy_to_pil(video) for video in videos]
    made = [pipe.caption(video, generator=seeds(1, 2), **QUICK) for video in (videos, tensor, pil)]
    for output in made:
        assert output.frames is None and len(output.text) == 2 and output.tokens.shape == (2, 12)
        assert torch.equal(output.tokens, made[0].tokens)
    alone = pipe.caption(videos[1], generator=seeds(2), **QUICK)
    assert alone.text == made[0].text[1:]
    odd = np.pad(videos, ((0, 0), (0, 0), (0, 5), (0, 9), (0, 0)))  # brought to whole patches, and to 4k+1 frames
    assert pipe._latents_of(odd, None, None).shape == (2, tiny.CHANNELS, 2, 4, 6)
    assert pipe._latents_of(odd, 64, 48).shape == (2, tiny.CHANNELS, 2, 8, 6)


def test_questions_are_conditions(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    options = {"generator": seeds(1, 2), **QUICK}
    answered = pipe.answer(videos, ["what color is it", "which shape"], **options)
    assert torch.equal(
        answered.tokens,
        pipe.caption(videos, ["what color is it", "which shape"], **{**options, "generator": seeds(1, 2)}).tokens,
    )
    assert len(answered.text) == 2


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
def test_joint_makes_video_and_text(pipe: UniViGUPipeline, output_type: str) -> None:
    made = pipe.joint(["a red circle", "two"], **SIZE, generator=seeds(1, 2), output_type=output_type, **QUICK)
    assert len(made.text) == 2 and made.tokens.shape == (2, 12)
    shapes = {"np": (2, 5, 32, 48, 3), "pt": (2, 5, 3, 32, 48), "latent": (2, tiny.CHANNELS, 2, 4, 6)}
    if output_type == "pil":
        assert len(made.frames) == 2 and len(made.frames[0]) == 5 and made.frames[0][0].size == (48, 32)
    else:
        assert tuple(made.frames.shape) == shapes[output_type]


def test_editing_keeps_what_strength_leaves(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    arguments = {"output_type": "latent", **QUICK, "num_inference_steps": 8}
    with torch.no_grad():
        start = pipe._latents_of(videos, None, None)

    def distance(strength: float) -> float:
        made = pipe.edit(videos, "a blue square", strength, generator=seeds(1, 2), **arguments).frames
        return float((made - start).square().mean())

    assert distance(0.1) < distance(0.6)
    assert pipe.edit(videos, "a blue square", generator=seeds(1, 2), **QUICK).frames.shape == (2, 5, 32, 48, 3)


def test_callbacks_see_every_step(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    seen: list[Any] = []
    pipe.caption(videos, callback_on_step_end=lambda *args: seen.append(args), **{**QUICK, "caption_steps": 4})
    assert [(step, timestep) for _, step, timestep, _ in seen] == [(0, 750), (1, 500), (2, 250), (3, 0)]
    assert seen[-1][0] is pipe and seen[-1][3]["text"].shape == (2, 12)


def test_what_does_not_fit_is_named(pipe: UniViGUPipeline, videos: np.ndarray, tmp_path: Path) -> None:
    for task, message in (
        (lambda: pipe.caption(videos, ["a", "b", "c"], **QUICK), "3 of them for 2 videos"),
        (lambda: pipe.caption(videos[:, :, :8], **QUICK), "expected at least 16 x 16"),
        (lambda: pipe.caption(videos, caption_steps=0), r"sampling\.caption_steps=0"),
        (lambda: pipe.joint("a", height=40, width=48, num_frames=5), "height=40: expected a multiple of 16"),
        (lambda: pipe.joint("a", height=32, width=48, num_frames=6), "num_frames=6: expected a multiple of 4 plus 1"),
        (lambda: pipe.edit(videos, "a", strength=0.0, **QUICK), r"strength=0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            task()
    wan = tiny.make_pipeline()
    wan.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocab_embed"):
        UniViGUPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a UniViGUTransformer3DModel, got WanTransformer3DModel"):
        UniViGUPipeline(wan.tokenizer, wan.text_encoder, wan.vae, wan.scheduler, wan.transformer)


def test_options_are_taken_whole_or_singly(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    options = SamplingOptions(caption_steps=2, temperature=1.0)
    whole = pipe.caption(videos, options=options, generator=seeds(1, 2), max_sequence_length=16)
    single = pipe.caption(videos, caption_steps=2, temperature=1.0, generator=seeds(1, 2), max_sequence_length=16)
    assert torch.equal(whole.tokens, single.tokens)
    assert torch.equal(
        pipe.caption(videos, options=options, temperature=0.0, generator=seeds(1, 2), max_sequence_length=16).tokens,
        pipe.caption(videos, generator=seeds(1, 2), **QUICK).tokens,
    )


def test_a_checkpoint_becomes_a_pipeline(pipe: UniViGUPipeline, videos: np.ndarray, tmp_path: Path) -> None:
    tiny.make_pipeline().save_pretrained(tmp_path / "foundation")
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    options = ["--foundation", str(tmp_path / "foundation"), "--output", str(tmp_path / "out")]
    assert convert.main(["pipeline", "--checkpoint", str(tmp_path / "transformer"), *options]) == 0
    made = UniViGUPipeline.from_pretrained(tmp_path / "out")
    made.set_progress_bar_config(disable=True)
    tokens = [p.caption(videos, generator=seeds(1, 2), **QUICK).tokens for p in (pipe, made)]
    assert torch.equal(*tokens)
    assert convert.main(["pipeline", "--checkpoint", str(tmp_path / "none.ckpt"), *options]) == 2
