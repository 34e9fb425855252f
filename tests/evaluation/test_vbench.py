"""The videos that VBench is given: their names, seeds, and what a kill leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from univigu import UniViGUPipeline
from univigu.data.sample import DataError
from univigu.data.video import encode_mp4, read_video
from univigu.evaluation.vbench import ExportOptions, plan, video_name

Evaluate = Callable[[list[str]], int]
Capture = pytest.CaptureFixture[str]
SIZE = ["--height=32", "--width=32", "--num-frames=5", "--steps=2", "--prompt-length=16", "--device=cpu"]
LONG = "a large red circle moving left " * 20
PROMPTS = ["a red circle", "a/b \\ c", LONG, "a red circle", "v1.0, isn't it?"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "info.json"
    path.write_text(json.dumps([{"prompt_en": prompt, "dimension": ["color"]} for prompt in PROMPTS]))
    return str(path)


def command(prompts: str, model: str, output: Path, *more: str) -> list[str]:
    return ["vbench", f"--prompts={prompts}", f"--model={model}", f"--output={output}", *SIZE, *more]


def contents(folder: Path) -> dict[str, bytes]:
    names = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in names.items() if not name.parts[0].startswith(".")}


def vbench_reads(folder: Path) -> dict[str, str]:
    """The prompts of the videos as VBench's custom_input mode takes them (vbench/__init__.py, build_full_info_json)."""
    given = json.loads((folder / "prompts.json").read_text())
    by_path = {os.path.join(folder / "videos", name): prompt for name, prompt in given.items()}
    names = [name for name in os.listdir(folder / "videos") if Path(name).suffix.lower() in (".mp4", ".gif")]
    assert len(names) == len(os.listdir(folder / "videos"))  # its standard mode takes anything there for a video
    return {name: by_path[os.path.join(folder / "videos", name)] for name in names}


@pytest.mark.slow
def test_five_videos_a_prompt_with_seeds_of_their_own(
    prompts: str, model: str, tmp_path: Path, evaluate: Evaluate, capsys: Capture
) -> None:
    output = tmp_path / "run"
    assert evaluate(command(prompts, model, output)) == 0
    assert "complete: 20 rows, 0 of them errors" in capsys.readouterr().out
    rows = [json.loads(line) for line in (output / "videos.jsonl").read_text().splitlines()]
    assert len({row["seed"] for row in rows}) == 20 and [row["index"] for row in rows] == 4 * [0, 1, 2, 3, 4]
    read = vbench_reads(output)
    assert read == {row["video"]: row["prompt"] for row in rows}
    assert sorted(set(read.values())) == sorted(set(PROMPTS))
    for prompt in ("a red circle", "v1.0, isn't it?"):  # as the standard mode looks for them
        assert all((output / "videos" / f"{prompt}-{i}.mp4").is_file() for i in range(5))
    assert all(row["tokens_cut"] > 0 for row in rows if row["prompt"] == LONG)
    clips = [read_video(output / "videos" / row["video"], 5, 32, 32) for row in rows]
    assert all(not torch.equal(clips[0], clip) for clip in clips[1:])
    pipe = UniViGUPipeline.from_pretrained(model)
    arguments = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(rows[3]["seed"])
    frames = pipe(PROMPTS[0], **arguments, max_sequence_length=16, generator=generator, output_type="pt").frames[0]
    again = encode_mp4((frames.clamp(0, 1) * 255).round().to(torch.uint8), 8)
    assert again == (output / "videos" / "a red circle-3.mp4").read_bytes()  # the recorded seed gives the video


def test_batches_make_the_same_videos(prompts: str, model: str, tmp_path: Path, evaluate: Evaluate) -> None:
    for size in (1, 3):
        assert (
            evaluate(command(prompts, model, tmp_path / str(size), "--videos-per-prompt=2", f"--batch-size={size}"))
            == 0
        )
    clips = [
        torch.stack([read_video(path, 5, 32, 32) for path in sorted((tmp_path / size / "videos").iterdir())]).float()
        for size in ("1", "3")
    ]
    assert (clips[0] - clips[1]).abs().mean() < 1 < (clips[0] - clips[0].roll(1, 0)).abs().mean()


def test_a_finished_run_loads_nothing_and_other_options_are_refused(
    prompts: str, model: str, tmp_path: Path, evaluate: Evaluate, capsys: Capture
) -> None:
    output = tmp_path / "run"
    assert evaluate(command(prompts, model, output, "--videos-per-prompt=1")) == 0
    times = {path: path.stat().st_mtime_ns for path in output.glob("videos/*")}
    assert evaluate(command(prompts, model, output, "--videos-per-prompt=1")) == 0
    assert times == {path: path.stat().st_mtime_ns for path in output.glob("videos/*")}
    capsys.readouterr()
    assert evaluate(command(prompts, model, output, "--videos-per-prompt=1", "--seed=9")) == 2
    assert "was made with seed=0, this run has seed=9" in capsys.readouterr().err


def test_rows_that_are_no_prompts_become_errors(
    model: str, tmp_path: Path, evaluate: Evaluate, capsys: Capture
) -> None:
    path, output = tmp_path / "prompts.jsonl", tmp_path / "run"
    path.write_text('{"prompt": "a circle"}\nnot json\n{"prompt": "  "}\n{"text": 1}\n{"prompt": "\\ud800"}\n')
    assert evaluate(command(str(path), model, output, "--videos-per-prompt=2")) == 0
    assert "10 rows, 8 of them errors" in capsys.readouterr().out
    rows = [json.loads(line) for line in (output / "videos.jsonl").read_text().splitlines()]
    assert [row["error"] is None for row in rows] == 2 * [True] + 8 * [False]
    assert [row["prompt"] for row in rows[::2]] == ["a circle", "row 2", "row 3", "row 4", "row 5"]
    assert "prompts.jsonl:2: not JSON" in rows[2]["error"] and "prompts.jsonl:3: an empty prompt" in rows[4]["error"]
    assert "no valid Unicode" in rows[8]["error"]
    assert list(json.loads((output / "prompts.json").read_text())) == ["a circle-0.mp4", "a circle-1.mp4"]


def test_augmented_prompts_make_videos_under_the_plain_ones_names(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("a cat\na dog\n")
    (tmp_path / "long.txt").write_text("a cat with a long tail\na dog that barks\n")
    videos = plan(str(tmp_path / "plain.txt"), str(tmp_path / "long.txt"), ExportOptions(videos_per_prompt=1))
    assert [(row["video"], row["text"], row["seed"]) for row in videos] == [
        ("a cat-0.mp4", "a cat with a long tail", 0),
        ("a dog-0.mp4", "a dog that barks", 1),
    ]
    (tmp_path / "short.txt").write_text("a cat\n")
    with pytest.raises(DataError, match=r"--augmented='.*short\.txt': 1 rows for 2 prompts"):
        plan(str(tmp_path / "plain.txt"), str(tmp_path / "short.txt"), ExportOptions())


@pytest.mark.parametrize(
    "prompt", ["a cat", "x" * 400, "ü" * 200, "a/b", "..", " a ", "line\nbreak", "a\0b", "文" * 90]
)
def test_names_are_files(prompt: str, tmp_path: Path) -> None:
    names = {video_name(prompt, index) for index in range(25)}
    assert len(names) == 25
    for name in names:
        (tmp_path / name).write_bytes(b"")
        assert Path(name).name == name and len(name.encode()) <= 255
    assert video_name(prompt + "y", 0) not in names
    if prompt == "a cat":
        assert video_name(prompt, 4) == "a cat-4.mp4"


@pytest.mark.parametrize(
    "change,message",
    [
        (["--model=/nowhere"], "--model='/nowhere': no folder of a diffusers pipeline"),
        (["--prompts=/nowhere.txt"], "--prompts='/nowhere.txt': cannot be read"),
        (["--prompts=a cat"], "--prompts='a cat': expected a file of .jsonl, .json, .csv, .parquet, .txt"),
        (["--videos-per-prompt=0"], "videos_per_prompt=0: expected at least 1"),
        (["--dtype=int8"], "dtype='int8'"),
        (["--height=40"], "`height` and `width` have to be divisible by 16"),
        (["--workers=2"], "--workers=2: needs --engine ray"),
    ],
)
def test_mistakes_are_told_in_a_line(
    prompts: str, model: str, tmp_path: Path, evaluate: Evaluate, capsys: Capture, change: list[str], message: str
) -> None:
    assert evaluate([*command(prompts, model, tmp_path / "run"), *change]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err
    assert not contents(tmp_path / "run")
    if change == ["--height=40"]:  # what failed at once does not bind the folder
        assert evaluate(command(prompts, model, tmp_path / "run", "--videos-per-prompt=1")) == 0


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json"])
def test_a_mark_of_byte_order_is_no_part_of_a_prompt(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", "prompt_en": "a cat"}]
    content = {"p.txt": "a cat", "p.jsonl": json.dumps(rows[0]), "p.json": json.dumps(rows)}
    (tmp_path / name).write_text(content[name], encoding="utf-8-sig")
    assert [row["video"] for row in plan(str(tmp_path / name), None, ExportOptions(videos_per_prompt=1))] == [
        "a cat-0.mp4"
    ]
