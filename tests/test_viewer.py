"""The trajectory page: what it records, and that a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.browser import COMMAND, Browser
from univigu.models.encode import OFFICIAL, Conventions
from univigu.pipeline import UniViGUPipeline
from univigu.viewer import TrajectoryRecorder

SIZE = {"height": 32, "width": 48, "num_frames": 5}
QUICK = {"num_inference_steps": 4, "max_sequence_length": 16}
JOINT = {**QUICK, "joint_lag": 0, "guidance_scale": 3.0}


def make_pipe(flow: str = "mask", more_tokens: int = 0, **config: Any) -> UniViGUPipeline:
    wan = tiny.make_pipeline()
    model = tiny.make_unified(wan.transformer, len(wan.tokenizer) + more_tokens, text_flow=flow)
    model.register_to_config(text_length=12, **config)
    components = {name: wan.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    pipe = UniViGUPipeline(**components, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> UniViGUPipeline:
    return make_pipe()


def embedded(path: Path) -> dict[str, Any]:
    """The data inside a page."""
    (found,) = re.findall(r"const data = (\{.*\});", path.read_text())
    assert "<" not in found  # no tag or comment of a text
    return json.loads(found)


def animation(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/webp;base64,"))))


def test_joint_is_recorded_step_by_step(pipe: UniViGUPipeline, tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(pipe, scale=2)
    made = pipe.joint(["one", "two"], **SIZE, callback_on_step_end=recorder, output_type="np", **JOINT)
    recorder.steps[0]["words"].append("a <!-- <script> </script> word")
    recorder.save(tmp_path / "new" / "page.html")
    steps = embedded(tmp_path / "new" / "page.html")["steps"]
    assert steps[0]["words"].pop() == "a <!-- <script> </script> word"
    assert [(s["step"], s["of"]) for s in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [s["text_noise"] for s in steps] == [0.75, 0.5, 0.25, 0.0]
    noise = [s["video_noise"] for s in steps]
    assert noise == sorted(noise, reverse=True) and noise[-1] == 0.0
    clips = [animation(s["video"]) for s in steps]
    assert all(clip.size == (96, 64) and clip.n_frames == 5 for clip in clips)
    last = np.asarray(clips[-1].convert("RGB"), np.float32)[::2, ::2] / 255
    assert np.abs(last - made.frames[0, 0]).mean() < 0.05  # the first sample, up to compression
    assert np.abs(last - made.frames[1, 0]).mean() > 0.05
    masks = [s["words"].count("") for s in steps]
    assert masks == sorted(masks, reverse=True) and masks[0] > 0 and masks[-1] == 0


def test_each_caption_is_shown_with_its_own_video(pipe: UniViGUPipeline) -> None:
    recorder = TrajectoryRecorder(pipe, scale=1)
    for shade in (0.0, 1.0):
        pipe.caption(torch.full((1, 5, 3, 32, 48), shade), caption_steps=2, callback_on_step_end=recorder)
    first, *_, last = (step["video"] for step in recorder.steps)
    assert first != last and len({step["video"] for step in recorder.steps}) == 2


@pytest.mark.parametrize("flow", ["uniform", "embedding"])
def test_captions_of_other_flows(flow: str) -> None:
    pipe = make_pipe(flow)
    recorder = TrajectoryRecorder(pipe, every=2)
    video = np.random.default_rng(0).random((1, 5, 32, 48, 3), dtype=np.float32)
    made = pipe.caption(video, callback_on_step_end=recorder, caption_steps=6, max_sequence_length=16)
    assert [s["step"] for s in recorder.steps] == [1, 3, 5, 6]
    assert all(s["video_noise"] == 0.0 and s["video"] == recorder.steps[0]["video"] for s in recorder.steps)
    text = "".join(recorder.steps[-1]["words"]).replace("■", "").strip()
    assert text.split()[:1] == made.text[0].split()[:1] or not made.text[0]


def test_what_the_tokenizer_does_not_know_is_shown_as_such() -> None:
    pipe = make_pipe("uniform", more_tokens=200)
    known, recorder = len(pipe.tokenizer), TrajectoryRecorder(pipe)
    seen: list[list[int]] = []

    def record(pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        seen.append(tensors["text"][0].tolist())
        recorder(pipe, step, timestep, tensors)

    video = np.zeros((1, 5, 32, 48, 3), dtype=np.float32)
    pipe.caption(video, generator=seeded(), callback_on_step_end=record, caption_steps=6, max_sequence_length=16)
    assert any(max(tokens) >= known for tokens in seen)
    for step, tokens in zip(recorder.steps, seen, strict=True):
        shown = list(zip(step["words"], tokens, strict=False))
        assert all((word == "\ufffd") == (token >= known) for word, token in shown)


def test_a_text_that_ends_early_is_kept_to_its_end() -> None:
    pipe = make_pipe()
    with torch.no_grad():  # it ends anywhere; the text is done when chance has revealed its first position
        pipe.transformer.text_head.linear.bias[pipe.tokenizer.eos_token_id] = 20.0
    recorder, taken = TrajectoryRecorder(pipe, every=100), []

    def record(pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        taken.append(step + 1)
        recorder(pipe, step, timestep, tensors)

    options = {"text_order": "random", "caption_steps": 50, "max_sequence_length": 16, "generator": seeded()}
    video = np.random.default_rng(0).random((1, 5, 32, 48, 3), dtype=np.float32)
    made = pipe.caption(video, callback_on_step_end=record, **options)
    assert made.text == [""] and 1 < len(taken) < 50
    assert [step["step"] for step in recorder.steps] == [1, taken[-1]]
    assert recorder.steps[-1]["words"] == ["■"]


def test_a_model_that_knows_other_latents_is_shown_as_it_is_made() -> None:
    """The authors' preview sees the VAE's own latents: the last step recorded is the video that comes out."""
    pipe = make_pipe(
        latents_normalized=OFFICIAL.latents_normalized,
        null_condition=OFFICIAL.null_condition,
        prompt_padding=OFFICIAL.prompt_padding,
    )
    assert Conventions.of(pipe.transformer.config) == OFFICIAL
    recorder = TrajectoryRecorder(pipe, scale=1)
    made = pipe.joint("one", **SIZE, callback_on_step_end=recorder, generator=seeded(), output_type="np", **JOINT)
    shown = np.asarray(animation(recorder.steps[-1]["video"]).convert("RGB"), np.float32) / 255
    latents = pipe.joint("one", **SIZE, generator=seeded(), output_type="latent", **JOINT).frames
    with torch.no_grad():
        wrong = pipe.video_processor.postprocess_video(Conventions().decode(pipe.vae, latents), output_type="np")
    # up to compression; WanPipeline's convention gives another picture
    assert distance(shown, made.frames[0, 0]) < 0.8 * distance(shown, wrong[0, 0])


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """The mean difference of blocks of 8 x 8 pixels; within blocks compression changes what is nearly noise."""
    blocks = np.abs((first - second).reshape(4, 8, 6, 8, 3).mean((1, 3)))
    return float(blocks.mean())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_generation_has_no_text(pipe: UniViGUPipeline) -> None:
    recorder = TrajectoryRecorder(pipe)
    video = np.random.default_rng(0).random((1, 5, 32, 48, 3), dtype=np.float32)
    pipe.edit(video, "two", 0.5, callback_on_step_end=recorder, **QUICK)
    assert recorder.steps and all(s["words"] is None and s["text_noise"] is None for s in recorder.steps)


def test_wan_pipelines_own_call_is_recorded(pipe: UniViGUPipeline) -> None:
    recorder = TrajectoryRecorder(pipe, scale=1)
    made = pipe("one", **SIZE, num_inference_steps=3, max_sequence_length=16, callback_on_step_end=recorder)
    assert [s["step"] for s in recorder.steps] == [1, 2, 3]
    noise = [s["video_noise"] for s in recorder.steps]
    assert 1 > noise[0] > noise[1] > noise[2] == 0.0
    last = np.asarray(animation(recorder.steps[-1]["video"]).convert("RGB"), np.float32) / 255
    assert distance(last, made.frames[0, 0]) < 0.01


def test_misuse_is_named(pipe: UniViGUPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was recorded"):
        TrajectoryRecorder(pipe).save(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(COMMAND is None, reason="needs the command chromium")
def test_a_browser_shows_the_step_that_the_slider_is_dragged_to(pipe: UniViGUPipeline, tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(pipe)
    torch.manual_seed(0)
    pipe.joint("one", **SIZE, callback_on_step_end=recorder, **{**JOINT, "num_inference_steps": 6})
    page = tmp_path / "page.html"
    recorder.save(page)
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"file://{page}")
        left, top, width, height = browser.box(element("slider"))
        pictures, shown = [], 1
        for step in (1, 4, 6, 2):
            # A slider's knob stays inside of it: its centre moves between 8 pixels from either end.
            places = [left + 8 + (width - 16) * (number - 1) / 5 for number in (shown, step)]
            if step != shown:
                browser.drag(places[0], top + height / 2, places[1])
                shown = step
            recorded = recorder.steps[step - 1]
            assert browser.read(f"{element('step')}.textContent") == f"step {step} of 6"
            words = browser.read(f"[...{element('text')}.children].map(word => word.textContent)")
            assert words == [word or " ·" for word in recorded["words"]]
            before = recorder.steps[step - 2]["words"] if step > 1 else [None] * len(words)
            changed = [bool(new) and new != old for new, old in zip(recorded["words"], before, strict=False)]
            classes = browser.read(f"[...{element('text')}.children].map(word => word.className === 'changed')")
            assert classes[: len(changed)] == changed
            noise = browser.read(f"[{element('video_noise')}.value, {element('text_noise')}.value]")
            assert noise == [recorded["video_noise"], recorded["text_noise"]]
            browser.wait(f"{element('video')}.complete && {element('video')}.naturalWidth")
            pictures.append(np.asarray(browser.picture(browser.box(element("video"))), np.float32))
            # What is seen on the screen is a frame of that step's video, and of no other step's.
            distances = [nearest_frame(pictures[-1], animation(other["video"])) for other in recorder.steps]
            assert int(np.argmin(distances)) == step - 1, distances
        assert len({words.tobytes() for words in pictures}) == 4


@pytest.mark.skipif(COMMAND is None, reason="needs the command chromium")
def test_a_browser_plays_the_steps(pipe: UniViGUPipeline, tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(pipe)
    pipe.joint("one", **SIZE, callback_on_step_end=recorder, **JOINT)
    page = tmp_path / "page.html"
    recorder.save(page)
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"file://{page}#2")
        assert browser.read(f"{element('step')}.textContent") == "step 2 of 4"
        browser.click(element("play"))
        browser.wait(f"{element('step')}.textContent === 'step 4 of 4' && {element('play')}.textContent === 'play'")


def element(name: str) -> str:
    return f"document.getElementById('{name}')"


def nearest_frame(shown: np.ndarray, clip: Image.Image) -> float:
    """How far what is shown [H, W, 3] (with a border of a pixel) is from the nearest frame of an animation."""
    distances = []
    for i in range(clip.n_frames):  # type: ignore[attr-defined]
        clip.seek(i)
        frame = np.asarray(clip.convert("RGB"), np.float32)
        inside = shown[1 : 1 + frame.shape[0], 1 : 1 + frame.shape[1]]
        distances.append(float(np.abs(inside - frame).mean()))
    return min(distances)
