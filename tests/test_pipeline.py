"""The pipeline: one folder in and out, every task from it, and clear words where something does not fit."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import univigu
from tests import tiny
from tools import convert
from univigu.data.video import to_uint8
from univigu.models.tokens import TextTooLongError, replace_words, token_count
from univigu.pipeline import UniViGUPipeline
from univigu.sampling.options import TASK_OPTIONS, SamplingOptions
from univigu.shapes.renderer import render
from univigu.shapes.scenes import sample_scene
from univigu.training.module import UniViGU

SIZE = {"height": 32, "width": 48, "num_frames": 5}
QUICK = {"num_inference_steps": 2, "max_sequence_length": 16}
READ = {"caption_steps": 2, "max_sequence_length": 16}


def make_pipe(
    text_flow: str = "mask", kind: type[UniViGUPipeline] = univigu.UniViGUPipeline, **architecture: Any
) -> UniViGUPipeline:
    wan = tiny.make_pipeline()
    model = tiny.make_unified(wan.transformer, len(wan.tokenizer), text_flow=text_flow, **architecture)
    model.register_to_config(text_length=12)
    pipe = kind(wan.tokenizer, wan.text_encoder, wan.vae, wan.scheduler, model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> UniViGUPipeline:
    return make_pipe()


@pytest.fixture(scope="module")
def videos() -> np.ndarray:
    """Two clips of 7 frames of 32 x 48."""
    return np.random.default_rng(0).random((2, 7, 32, 48, 3), dtype=np.float32)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_calling_it_is_wan_pipeline(pipe: UniViGUPipeline) -> None:
    wan = WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.scheduler, pipe.transformer)
    wan.set_progress_bar_config(disable=True)
    arguments = {**SIZE, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np"}
    frames = [p("a red circle", generator=torch.Generator().manual_seed(3), **arguments).frames for p in (pipe, wan)]
    assert frames[0].shape == (1, 5, 32, 48, 3)
    np.testing.assert_allclose(*frames, atol=1e-4)  # prompts are encoded one by one here
    assert signature(pipe.__call__) == signature(wan.__call__)


def test_it_survives_saving(pipe: UniViGUPipeline, videos: np.ndarray, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = UniViGUPipeline.from_pretrained(tmp_path)
    assert type(WanPipeline.from_pretrained(tmp_path).transformer) is type(pipe.transformer)
    again.set_progress_bar_config(disable=True)
    for name in ("transformer", "text_encoder", "vae"):
        ours, theirs = (getattr(p, name).state_dict() for p in (pipe, again))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    tokens = [p.caption(videos, generator=seeds(1, 2), **READ).tokens for p in (pipe, again)]
    assert torch.equal(*tokens)


def test_captions_of_every_form_of_video(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    tensor = torch.from_numpy(videos).permute(0, 1, 4, 2, 3)
    pil = [pipe.video_processor.numpy_to_pil(video) for video in videos]
    made = [pipe.caption(video, generator=seeds(1, 2), **READ) for video in (videos, tensor, pil)]
    for output in made:
        assert output.frames is None and len(output.text) == 2 and output.tokens.shape == (2, 12)
        assert torch.equal(output.tokens, made[0].tokens)
    alone = pipe.caption(videos[1], generator=seeds(2), **READ)
    assert alone.text == made[0].text[1:]
    odd = np.pad(videos, ((0, 0), (0, 0), (0, 5), (0, 9), (0, 0)))  # brought to whole patches, and to 4k+1 frames
    assert pipe._pixels(odd, None, None).shape == (2, 3, 5, 32, 48)
    assert pipe._pixels(odd, 64, 48).shape == (2, 3, 5, 64, 48)


def test_questions_are_conditions(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    questions = ["what color is it", "which shape"]
    answered, captioned = (
        task(videos, questions, generator=seeds(1, 2), **READ) for task in (pipe.answer, pipe.caption)
    )
    assert torch.equal(answered.tokens, captioned.tokens) and len(answered.text) == 2


@pytest.mark.parametrize("reads", [True, False])
def test_several_questions_about_a_video_are_answered_as_each_alone(reads: bool, videos: np.ndarray) -> None:
    """With one pass of a video that reads neither text nor prompt."""
    pipe = make_pipe(clean_video_reads_text=reads, clean_video_reads_prompt=reads)
    questions, read = ["what color is it", "which shape", "", "which shape"], READ | {"temperature": 1.0}
    passes: list[int] = []
    pipe.transformer.patch_embedding.register_forward_hook(lambda *_: passes.append(1))
    together = pipe.caption(videos[0], questions, generator=seeds(1, 2, 3, 4), **read)
    assert len(passes) == (8 if reads else 1)
    alone = [pipe.caption(videos[0], text, generator=seeds(i + 1), **read) for i, text in enumerate(questions)]
    assert together.text == [output.text[0] for output in alone] and len(set(together.text)) == 4
    with pytest.raises(ValueError, match="4 of them for 2 videos"):
        pipe.caption(videos, questions, **read)


def test_samples_are_the_same_in_any_batch(pipe: UniViGUPipeline) -> None:
    """Up to rounding: texts are equal, latents differ by 1e-5, and one in a thousand values of the frames by a level.

    Decoding clip by clip would not change this, since the denoised latents differ already.
    """
    prompts = ["a red circle", "two", "a blue ring"]
    whole = pipe.joint(prompts, **SIZE, generator=seeds(1, 2, 3), output_type="pt", **QUICK)
    single = [pipe.joint(p, **SIZE, generator=seeds(i), output_type="pt", **QUICK) for i, p in enumerate(prompts, 1)]
    assert whole.text == [one.text[0] for one in single]
    levels = [to_uint8(frames).int() for frames in (whole.frames, torch.cat([one.frames for one in single]))]
    assert (levels[0] - levels[1]).abs().max() <= 1 and (levels[0] != levels[1]).float().mean() < 1e-3
    latents = [
        pipe.joint(p, **SIZE, generator=g, output_type="latent", **QUICK).frames
        for p, g in ((prompts, seeds(1, 2, 3)), (prompts[1], seeds(2)))
    ]
    torch.testing.assert_close(latents[0][1:2], latents[1], rtol=0, atol=1e-5)
    assert (whole.frames[0] - whole.frames[1]).abs().max() > 0.1  # negative control: another sample


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
def test_joint_makes_video_and_text(pipe: UniViGUPipeline, output_type: str) -> None:
    made = pipe.joint(["a red circle", "two"], **SIZE, generator=seeds(1, 2), output_type=output_type, **QUICK)
    assert len(made.text) == 2 and made.tokens.shape == (2, 12)
    shapes = {"np": (2, 5, 32, 48, 3), "pt": (2, 5, 3, 32, 48), "latent": (2, tiny.CHANNELS, 2, 4, 6)}
    if output_type == "pil":
        assert len(made.frames) == 2 and len(made.frames[0]) == 5 and made.frames[0][0].size == (48, 32)
    else:
        assert tuple(made.frames.shape) == shapes[output_type]


def test_an_edit_by_caption_is_an_edit_under_the_models_own_prompt(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    own = pipe.caption(videos[0], **{**READ, "caption_steps": 50}).text[0]
    words = {own.split()[0]: "one"}
    made = pipe.edit(videos[0], replace=words, generator=seeds(1), **QUICK)
    assert made.text == [replace_words(own, words)] != [own]
    same = pipe.edit(videos[0], made.text, generator=seeds(1), **QUICK)
    assert np.array_equal(made.frames, same.frames) and same.text is None
    named = pipe.edit(videos, "a red circle", replace={"red": "blue"}, **QUICK)
    assert named.text == ["a blue circle"] * 2


def test_editing_keeps_what_strength_leaves(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    arguments = {"output_type": "latent", **QUICK, "num_inference_steps": 8}
    with torch.no_grad():
        start = pipe._runner().encode_video(pipe._pixels(videos, None, None))

    def distance(strength: float) -> float:
        made = pipe.edit(videos, "a blue square", strength, generator=seeds(1, 2), **arguments).frames
        return float((made - start).square().mean())

    assert distance(0.1) < distance(0.6)
    assert pipe.edit(videos, "a blue square", generator=seeds(1, 2), **QUICK).frames.shape == (2, 5, 32, 48, 3)


def test_callbacks_see_every_step(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    seen: list[Any] = []
    pipe.caption(videos, callback_on_step_end=lambda *args: seen.append(args), **{**READ, "caption_steps": 4})
    assert [(step, timestep) for _, step, timestep, _ in seen] == [(0, 750), (1, 500), (2, 250), (3, 0)]
    assert seen[-1][0] is pipe and seen[-1][3]["text"].shape == (2, 12)


def test_what_does_not_fit_is_named(pipe: UniViGUPipeline, videos: np.ndarray, tmp_path: Path) -> None:
    for task, message in (
        (lambda: pipe.caption(videos, ["a", "b", "c"], **READ), "3 of them for 2 videos"),
        (lambda: pipe.caption(videos[:, :, :8], **READ), "expected at least 16 x 16"),
        (lambda: pipe.caption(videos, caption_steps=0), r"sampling\.caption_steps=0"),
        (lambda: pipe.joint("a", height=40, width=48, num_frames=5), "height=40: expected a multiple of 16"),
        (lambda: pipe.joint("a", height=32, width=48, num_frames=6), r"num_frames=6: expected 4k\+1 "),
        (lambda: pipe.edit(videos, "a", strength=0.0, **QUICK), r"strength=0\.0"),
        (lambda: pipe.edit(videos, **QUICK), "prompt=None: edit needs a prompt, or the words to replace"),
        (lambda: pipe.edit(videos, "a", replace={"zebra": "b"}, **QUICK), "replace: 'zebra' does not occur in 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            task()
    wan = tiny.make_pipeline()
    wan.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a UniViGUTransformer3DModel, got WanTransformer3DModel"):
        UniViGUPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a UniViGUTransformer3DModel, got WanTransformer3DModel"):
        UniViGUPipeline(wan.tokenizer, wan.text_encoder, wan.vae, wan.scheduler, wan.transformer)


def test_an_empty_question_or_list_is_refused(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    """Either would give a caption without a condition instead, or fail far below."""
    for question in ("", " ", ["what moves?", ""]):
        with pytest.raises(ValueError, match=r"question=.*empty"):
            pipe.answer(videos, question, **READ)
    for call in (lambda: pipe.caption(videos, [], **READ), lambda: pipe.joint([], 16, 16, 5)):
        with pytest.raises(ValueError, match=r"prompt=\[\]: expected at least one"):
            call()


def test_options_are_taken_whole_or_singly(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    options = SamplingOptions(caption_steps=2, temperature=1.0)
    whole = pipe.caption(videos, options=options, generator=seeds(1, 2), max_sequence_length=16)
    single = pipe.caption(videos, caption_steps=2, temperature=1.0, generator=seeds(1, 2), max_sequence_length=16)
    assert torch.equal(whole.tokens, single.tokens)
    assert torch.equal(
        pipe.caption(videos, options=options, temperature=0.0, generator=seeds(1, 2), max_sequence_length=16).tokens,
        pipe.caption(videos, generator=seeds(1, 2), **READ).tokens,
    )


LONG = "a large red circle moving left slowly"


def test_no_task_cuts_a_prompt(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    count = token_count(pipe.tokenizer, LONG)
    tasks = (
        lambda slot: pipe.caption(videos, LONG, caption_steps=1, max_sequence_length=slot),
        lambda slot: pipe.answer(videos, ["one", LONG], caption_steps=1, max_sequence_length=slot),
        lambda slot: pipe.joint(LONG, **SIZE, num_inference_steps=1, max_sequence_length=slot),
        lambda slot: pipe.edit(videos, LONG, num_inference_steps=1, max_sequence_length=slot),
    )
    for task in tasks:
        task(count)
        with pytest.raises(TextTooLongError, match=rf"max_sequence_length={count - 1}: prompt has {count} tokens"):
            task(count - 1)
    # the pipeline's own call is WanPipeline's, which cuts
    cut = {**SIZE, "num_inference_steps": 1, "max_sequence_length": count - 1}
    assert pipe(LONG, **cut).frames.shape == (1, 5, 32, 48, 3)


def test_an_option_that_a_task_would_ignore_is_refused(pipe: UniViGUPipeline, videos: np.ndarray) -> None:
    caption = partial(pipe.caption, videos, max_sequence_length=16)
    joint = partial(pipe.joint, "one", **SIZE, max_sequence_length=16)
    edit = partial(pipe.edit, videos, "one", max_sequence_length=16)
    for task, options, message in (
        (
            caption,
            {"num_inference_steps": 10},
            "num_inference_steps=10: caption does not use it; it uses caption_steps",
        ),
        (caption, {"guidance_scale": 2.0}, r"guidance_scale=2\.0: caption .* uses .*caption_guidance_scale"),
        (caption, {"solver": "euler"}, "solver='euler': caption does not use it; it uses caption_steps,"),
        (joint, {"caption_steps": 5}, "caption_steps=5: joint does not use it; it uses num_inference_steps"),
        (joint, {"joint_lag": 0, "caption_refresh": 2}, "caption_refresh=2: .* use it with joint_lag over 0"),
        (edit, {"caption_steps": 5}, "caption_steps=5: edit does not use it; it uses num_inference_steps"),
        (edit, {"temperature": 1.0}, r"temperature=1\.0: edit does not use it; it uses num_inference_steps,"),
    ):
        with pytest.raises(ValueError, match=message):
            task(**options)
    for task, name in (
        (caption, "no_such_option"),
        (joint, "strength"),
        (caption, "negative_prompt"),
        (edit, "num_frames"),
        (joint, "return_dict"),
        (caption, "callback_on_step_end_tensor_inputs"),
    ):
        with pytest.raises(ValueError, match=f"{name}=1: .* does not use it; it uses "):
            task(**{name: 1})

    whole = SamplingOptions(num_inference_steps=1, caption_steps=1, caption_refresh=2)
    for task in (caption, joint, edit):
        task(options=whole)
    joint(num_inference_steps=1, joint_lag=1, caption_refresh=2, text_order="confidence")


@pytest.mark.parametrize(
    ("flow", "known", "unknown"),
    [("uniform", {"top_p": 0.9}, "text_order"), ("embedding", {"temperature": 0.5}, "text_order")],
)
def test_an_option_that_a_text_flow_does_not_know_is_refused(
    pipe: UniViGUPipeline, videos: np.ndarray, flow: str, known: dict[str, Any], unknown: str
) -> None:
    other = make_pipe(flow)
    value = {"text_order": "confidence", "temperature": 1.0}[unknown]
    assert other.caption(videos, **READ, **known).tokens.shape == (2, 12)
    with pytest.raises(ValueError, match=f"{unknown}={value!r}: caption with the '{flow}' text flow does not use it"):
        other.caption(videos, **READ, **{unknown: value})
    assert pipe.caption(videos, **READ, **{unknown: value}).tokens.shape == (2, 12)  # the mask flow knows them all


def test_the_table_of_options_has_no_other_names() -> None:
    listed = {name for names in TASK_OPTIONS.values() for name in names}
    assert listed == {field.name for field in fields(SamplingOptions)}


def test_the_progress_bar_of_a_text_that_ends_early_is_closed(videos: np.ndarray) -> None:
    bars = []

    class Kept(UniViGUPipeline):
        def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
            bars.append(super().progress_bar(*args, **kwargs))
            return bars[-1]

    pipe = make_pipe(kind=Kept)
    pipe.set_progress_bar_config()  # shown
    torch.nn.init.constant_(
        pipe.transformer.text_head.linear.bias[pipe.tokenizer.eos_token_id], 100.0
    )  # sure of the end
    pipe.caption(videos, text_order="confidence", max_sequence_length=16)
    (bar,) = bars
    assert bar.n == 1 and bar.total == 50 and bar.disable  # as tqdm leaves a bar that was closed


def test_a_checkpoint_becomes_a_pipeline(pipe: UniViGUPipeline, videos: np.ndarray, tmp_path: Path) -> None:
    tiny.make_pipeline().save_pretrained(tmp_path / "foundation")
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    options = ["--foundation", str(tmp_path / "foundation"), "--output", str(tmp_path / "out")]
    assert convert.main(["pipeline", "--checkpoint", str(tmp_path / "transformer"), *options]) == 0
    made = UniViGUPipeline.from_pretrained(tmp_path / "out")
    made.set_progress_bar_config(disable=True)
    tokens = [p.caption(videos, generator=seeds(1, 2), **READ).tokens for p in (pipe, made)]
    assert torch.equal(*tokens)
    assert convert.main(["pipeline", "--checkpoint", str(tmp_path / "none.ckpt"), *options]) == 2


@pytest.mark.slow
def test_a_clips_latents_do_not_depend_on_the_entry_point(foundation: str) -> None:
    """Training, captioning and prediction encode alike: a clip by itself, in a batch, as floats or as frames."""
    module = UniViGU(foundation, seed=1)
    module.configure_model()
    parts = module.foundation
    pipe = UniViGUPipeline(parts.tokenizer, parts.text_encoder, parts.vae, parts.scheduler(), module.transformer)
    frames = torch.stack([render(sample_scene(seed), 64, 64, 9) for seed in range(5)])
    batch = module.latents_of({"video": frames})
    for i in range(5):
        assert torch.equal(module.latents_of({"video": frames[i : i + 1]})[0], batch[i])
    floats = frames.float() / 255
    by_pipeline = pipe._runner().encode_video(pipe._pixels(floats, None, None))
    single = pipe._runner().encode_video(pipe._pixels(floats[3:4], None, None))
    assert torch.equal(single[0], by_pipeline[3])
    torch.testing.assert_close(by_pipeline, batch, rtol=1e-4, atol=1e-5)  # x / 255 * 2 - 1 rounds unlike x / 127.5 - 1
    assert (by_pipeline[0] - batch[1]).abs().max() > 0.1  # negative control: another clip
