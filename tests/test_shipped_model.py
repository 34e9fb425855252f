"""The unified model that ships: it captions, answers and generates without any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from packaging.version import Version

from univigu.cli import main
from univigu.data.video import encode_mp4
from univigu.models.foundation import EMBEDDED_FOUNDATION, EMBEDDED_MODEL
from univigu.pipeline import UniViGUPipeline
from univigu.shapes.metrics import ShapesTextAccuracy
from univigu.shapes.renderer import render
from univigu.shapes.scenes import sample_scene
from univigu.shapes.texts import questions_of

SCENES = [sample_scene(seed, "test") for seed in range(12)]
CONFIG = Path(__file__).parents[1] / "configs" / "caption.yaml"


@pytest.fixture(scope="module")
def pipe() -> UniViGUPipeline:
    return UniViGUPipeline.from_pretrained()


def test_it_is_small_and_its_generator_is_the_foundations() -> None:
    first, second = (path.read_bytes() for path in sorted(Path(EMBEDDED_MODEL).glob("*.safetensors")))
    generator = Path(EMBEDDED_FOUNDATION, "transformer", "diffusion_pytorch_model.safetensors").read_bytes()
    assert first == generator and second != generator
    assert sum(path.stat().st_size for path in Path(EMBEDDED_MODEL).rglob("*") if path.is_file()) <= 8 * 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, {"transformer": torch.bfloat16, "default": torch.float32}])
@pytest.mark.parametrize("name", ["torch_dtype"] + ["dtype"] * (Version(diffusers.__version__) >= Version("0.42")))
def test_a_dtype_reaches_its_transformer(name: str, dtype: Any) -> None:
    pipe = UniViGUPipeline.from_pretrained(**{name: dtype})
    assert pipe.transformer.vocab_embed.weight.dtype == torch.bfloat16
    assert (pipe.text_encoder.dtype == torch.bfloat16) == (dtype == torch.bfloat16)


@pytest.mark.slow
def test_it_captions_held_out_clips(pipe: UniViGUPipeline) -> None:
    frames = torch.stack([render(scene) for scene in SCENES])
    captions = pipe.caption(frames, caption_steps=16, generator=torch.Generator().manual_seed(0)).text
    metric, others = ShapesTextAccuracy(), ShapesTextAccuracy()
    metric.update(captions, SCENES)
    others.update(captions, SCENES[1:] + SCENES[:1])
    assert metric.compute()["mean"] > 0.85
    assert others.compute()["mean"] < 0.6


@pytest.mark.slow
def test_it_answers_questions(pipe: UniViGUPipeline) -> None:
    asked = [(scene, pair) for scene in SCENES[:4] for pair in questions_of(scene)]
    frames = torch.stack([render(scene) for scene, _ in asked])
    questions = [pair["question"] for _, pair in asked]
    answers = pipe.answer(frames, questions, caption_steps=4, generator=torch.Generator().manual_seed(0)).text
    right = [answer == pair["answer"] for answer, (_, pair) in zip(answers, asked, strict=True)]
    assert sum(right) >= 0.9 * len(right), list(zip(questions, answers, strict=True))


@pytest.mark.slow
def test_predict_uses_it_where_nothing_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clip.mp4").write_bytes(encode_mp4(render(SCENES[0])))
    arguments = ["--config", str(CONFIG), "--data.videos", "clip.mp4", "--model.sampling.caption_steps", "4"]
    main(["predict", *arguments])
    assert "using the model that ships" in capsys.readouterr().out
    (row,) = map(json.loads, Path("runs/caption/captions.jsonl").read_text().splitlines())
    assert SCENES[0].background in row["caption"]
