"""Synthesis with real components: the shipped foundation, and a tiny random language model that sees images."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from transformers import AutoTokenizer

from tests.damage import is_intact
from tests.tiny_captioner import write_captioner
from tools.synthesize import main
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.index import index_folder
from univigu.data.options import LengthFilter
from univigu.data.sample import DataError
from univigu.data.shards import Manifest, sha256_of
from univigu.data.synthesis import CaptionModel, CaptionOptions, Pipeline, Synthesis, VideoOptions, derived_seed
from univigu.data.video import read_video
from univigu.models.tokens import token_count
from univigu.shapes import renderer, scenes, texts

PROMPTS = [texts.prompt_of(scenes.sample_scene(seed)) for seed in range(5)]
FAST = ["--steps", "2", "--guidance-scale", "1", "--shard-size", "2", "--batch-size", "2"]
Tool = Callable[..., Manifest]


@pytest.fixture(scope="session")
def captioner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    """Run the command on a file of prompts and give the manifest."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(folder: str, *args: Any, prompts: str = "prompts.txt") -> Manifest:
        paths = ["--prompts", str(tmp_path / prompts), "--output", str(tmp_path / folder)]
        assert main([*paths, *FAST, *map(str, args)]) == 0
        manifest = Manifest.load(tmp_path / folder)
        assert manifest is not None and (not manifest.complete or is_intact(tmp_path / folder))
        return manifest

    return run


def texts_of(folder: Path) -> list[dict[str, Any]]:
    refs, errors = index_folder(folder)
    assert not errors
    return [{"key": ref.key, **json.loads(ref.read("json") or b"")} for ref in refs]


@pytest.mark.slow
def test_clips_are_what_the_pipeline_makes_of_prompt_and_seed(tool: Tool, tmp_path: Path, foundation: str) -> None:
    manifest = tool("made", "--seed", 7, "--videos-per-prompt", 2)
    assert manifest.complete and manifest.counts == {"kept": 10} and len(manifest.shards) == 5
    texts = texts_of(tmp_path / "made")
    assert [text["key"] for text in texts] == [f"{i:08d}" for i in range(10)]
    assert [text["seed"] for text in texts] == list(range(7, 17))
    assert [text["prompt"] for text in texts] == [prompt for prompt in PROMPTS for _ in range(2)]
    tokenizer = AutoTokenizer.from_pretrained(f"{foundation}/tokenizer")
    assert all(128 <= token_count(tokenizer, text["caption"]) <= 256 for text in texts)
    pipeline = DiffusionPipeline.from_pretrained(foundation)
    refs, _ = index_folder(tmp_path / "made")
    clips = [read_video(ref.read("mp4") or b"", 9, 64, 64).float() / 255 for ref in refs]
    for number in (0, 5):  # each alone, without the batch it was made in
        video = pipeline(
            texts[number]["prompt"],
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(7 + number),
            output_type="pt",
        ).frames[0]
        errors = [(clip - video).abs().mean().item() for clip in clips]
        assert errors[number] < 0.02  # 4:2:0 chroma and compression
        assert errors.index(min(errors)) == number  # and every other clip is another
    recorded = manifest.parameters
    assert recorded["prompts"] == {"file": "prompts.txt", "rows": 5, "sha256": sha256_of(tmp_path / "prompts.txt")}
    assert recorded["generator"]["fingerprint"] and recorded["tokenizer"] and recorded["video"]["seed"] == 7


@pytest.mark.slow
def test_a_made_folder_trains(tool: Tool, tmp_path: Path) -> None:
    for split in ("train", "val"):
        tool(f"data/{split}")
    data = VideoTextDataModule(shards=str(tmp_path / "data"), batch_size=2, num_workers=0, precompute=False)
    data.prepare_data()
    data.setup("fit")
    assert data.filter_counts == {"train": {"kept": 5}, "val": {"kept": 5}}
    batch = next(iter(data.train_dataloader()))
    assert batch["video"].shape == (2, 9, 3, 64, 64) and set(batch["prompt"]) <= set(PROMPTS)


@pytest.mark.slow
def test_unusable_prompts_are_counted(tool: Tool, tmp_path: Path, foundation: str) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    rows: list[Any] = [PROMPTS[0], None, "red " * 200, PROMPTS[1]]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": rows}), tmp_path / "p.parquet")
    lines = [json.dumps({"prompt": row}) for row in rows]
    (tmp_path / "p.jsonl").write_text("\n".join([lines[0], "{", lines[2], lines[3]]))
    manifest = tool("made", prompts="p.jsonl")
    assert manifest.counts == {"kept": 2, "invalid_prompt": 1, "prompt_long": 1}
    assert [row["key"] for shard in manifest.shards for row in shard.skipped] == ["00000001", "00000002"]
    assert [text["key"] for text in texts_of(tmp_path / "made")] == ["00000000", "00000003"]
    pipeline = Pipeline(foundation, VideoOptions(), "cpu")
    lines, table = (Synthesis(f"{tmp_path}/p.{kind}", pipeline).rows for kind in ("jsonl", "parquet"))
    assert [row[0] for row in lines] == [row[0] for row in table] == [PROMPTS[0], "", rows[2], PROMPTS[1]]
    assert [row[1] is None for row in lines] == [row[1] is None for row in table] == [True, False, True, True]


def test_without_a_captioner_no_window_applies(tool: Tool, tmp_path: Path) -> None:
    assert tool("bare", "--captioner", "none").counts == {"kept": 5}
    assert {text["caption"] for text in texts_of(tmp_path / "bare")} == {""}


# ------------------------------------------------------------------ captions


@pytest.mark.slow
def test_captions_are_asked_for_again_until_they_fit(tool: Tool, tmp_path: Path, captioner_folder: Path) -> None:
    window = ["--min-caption", "50", "--max-caption", "200", "--tokenizer", str(captioner_folder)]
    asked = ["--captioner", str(captioner_folder), "--temperature", "1.2", "--top-p", "1", "--max-new-tokens", "70"]
    manifest = tool("captioned", *asked, *window, "--tries", 3, "--frames", 2)
    texts = texts_of(tmp_path / "captioned")
    assert manifest.counts["kept"] == len(texts) and sum(manifest.counts.values()) == 5
    tries = Counter([derived_seed(t["seed"], i) for i in range(3)].index(t["caption_seed"]) for t in texts)
    assert tries[0] and tries[1] + tries[2], tries  # some fitted at once, others after another seed
    assert manifest.counts["caption_short"], manifest.counts  # and some not at all
    tokenizer = AutoTokenizer.from_pretrained(captioner_folder)
    assert all(50 <= token_count(tokenizer, text["caption"]) <= 200 for text in texts)
    rejected = [row for shard in manifest.shards for row in shard.skipped]
    assert all(row["field"] == "caption" and int(row["value"].split()[0]) < 50 for row in rejected)
    assert manifest.parameters["captioner"]["tries"] == 3 and manifest.parameters["captioner"]["fingerprint"]


@pytest.mark.slow
def test_the_model_sees_frames_and_prompt(captioner_folder: Path) -> None:
    def describe(prompt: str, frames: torch.Tensor, seed: int = 3, attempt: int = 0, **options: Any) -> str:
        settings = CaptionOptions(frames=3, max_new_tokens=40, **options)
        model = CaptionModel(str(captioner_folder), settings, LengthFilter())
        return model.describe(frames, prompt, derived_seed(seed, attempt))

    red, blue = (renderer.render(scenes.sample_scene(seed)) for seed in (0, 1))
    first = describe("a red circle", red)
    assert first == describe("a red circle", red)
    others = [describe("a blue ring", red), describe("a red circle", blue), describe("a red circle", red, attempt=1)]
    assert len({first, *others, describe("a red circle", red, seed=4)}) == 5
    greedy = describe("a red <image> circle", red, temperature=0)  # the mark of a frame is none of the prompt's
    assert greedy == describe("a red <image> circle", red, seed=9, attempt=2, temperature=0)
    captioner = CaptionModel(str(captioner_folder), CaptionOptions(frames=3, temperature=0), LengthFilter())
    assert captioner.tries == 1  # nothing would change
    parts = captioner.messages("a <image> of it", 3)[0]["content"]
    assert [part["type"] for part in parts] == ["image"] * 3 + ["text"]
    assert "a   of it" in parts[-1]["text"] and "144 words" in parts[-1]["text"]


# --------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompts", "gone.txt"], "--prompts='gone.txt': cannot be read"),
        (["--prompts", "a cat"], "--prompts='a cat': expected a file of .jsonl, .json, .csv, .parquet, .txt"),
        (["--prompts", "p.txt", "--pipeline", "gone"], "--pipeline='gone': no folder of a diffusers pipeline"),
        (["--prompts", "p.txt", "--captioner", "gone"], "--captioner='gone': expected 'none', 'template', or"),
        (["--prompts", "p.txt", "--tokenizer", "gone"], "--tokenizer='gone': cannot be loaded"),
        (["--prompts", "p.txt", "--height", "63"], "height=63: expected an even number"),
        (["--prompts", "p.txt", "--steps", "0"], "steps=0: expected at least 1"),
        (["--prompts", "p.txt", "--seed", "-1"], "seed=-1: expected at least 0"),
        (["--prompts", "p.txt", "--dtype", "int8"], "dtype='int8'"),
        (["--prompts", "p.txt", "--top-p", "0"], "top_p=0.0"),
        (["--prompts", "p.txt", "--instruction", "{clip}"], "instruction: expected only {prompt}"),
        (["--prompts", "p.txt", "--workers", "2"], "--workers=2: needs --engine ray"),
        (["--prompts", "p.txt", "--shard-size", "0"], "shard_size=0"),
    ],
)
def test_mistakes_are_named(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("red")
    assert main(["--output", "made", *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_pipeline_for_something_else_is_refused(tool: Tool, tmp_path: Path, foundation: str) -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "images")
    pipeline = Pipeline(str(tmp_path / "images"), VideoOptions(), "cpu")
    work = Synthesis(str(tmp_path / "prompts.txt"), pipeline, tokenizer_folder=f"{foundation}/tokenizer")
    with pytest.raises(DataError, match=r"DDIMPipeline makes no video of a text; it takes no \['height'"):
        list(work.samples(range(1), []))
    (tmp_path / "images" / "model_index.json").write_text('{"_class_name": "NoPipeline"}')
    with pytest.raises(DataError, match="cannot be loaded"):
        _ = Pipeline(str(tmp_path / "images"), VideoOptions(), "cpu").pipe
    shutil.copytree(foundation, tmp_path / "cut")
    weights = tmp_path / "cut" / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be loaded"):
        _ = Pipeline(str(tmp_path / "cut"), VideoOptions(), "cpu").pipe
