"""Sound and broken inputs, mixed, for every command that reads a user's files.

No exception escapes; the exit code is right; every sound input is processed; every broken one is named and counted;
nothing incomplete is left under a final name.  UNIVIGU_INPUTS=100 gives as many inputs to each command.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests import damage
from tests.conftest import REPO
from tools import convert, encode, evaluate, synthesize
from univigu import cli
from univigu.data.index import index_folder
from univigu.data.shards import Manifest
from univigu.data.video import read_video
from univigu.models.foundation import EMBEDDED_FOUNDATION

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("UNIVIGU_INPUTS", 10))
PROMPT = "a small red circle moving left slowly, on a black background"
BROKEN_VIDEOS = ("empty-video", "cut-video", "text-video", "noise-video", "zeroed-video", "audio-only", "no-frames")
BROKEN_ROWS = (
    "no json",
    "[1, 2]",
    "3",
    '{"text": "x"}',
    '{"prompt": 5}',
    '{"prompt": null}',
    '{"prompt": ["a"]}',
    "{",
    '{"prompt": "half \\ud83d a character"}',
    '{"prompt": "cut',
)
ODD_TEXTS = ("", " ", "ä ö ü", "红色的圆", "a\u2028b\x85c", "\\ \" ' {} %s", "🟥", "\x00\x07")


class Model(NamedTuple):
    checkpoint: Path
    pipeline: Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_data: list[str]) -> Model:
    """A model after one step of training, as a checkpoint and as a pipeline folder."""
    folder = tmp_path_factory.mktemp("model")
    cli.main(
        [
            "fit",
            *(f"--config={REPO}/configs/{name}.yaml" for name in ("recall", "frozen")),
            f"--trainer.default_root_dir={folder}",
            "--stages.recall.steps=1",
            *small_data,
            "--report.num_samples=1",
            "--trainer.logger=false",
        ]
    )
    checkpoint = folder / "checkpoints" / "last.ckpt"
    assert convert.main(["pipeline", f"--checkpoint={checkpoint}", f"--output={folder / 'model'}"]) == 0
    return Model(checkpoint, folder / "model")


def check_complete(folder: Path) -> None:
    """No temporary files, and no videos that cannot be read."""
    for path in folder.rglob("*"):
        assert path.suffix not in (".part", ".tmp") and ".part" not in path.suffixes
        if path.suffix == ".mp4":
            assert len(read_video(path, 1, 16, 16)) == 1


def check_rows(path: Path, sound: list[bool]) -> None:
    """A row for each input, with an error where it is broken and none where it is sound."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["error"] is None for row in rows] == sound, [row for row in rows if row["error"]]
    check_complete(path.parent)


def check_shards(folder: Path, sound: set[str], count: int) -> None:
    """The folder is complete, holds the sound samples, and counts all others."""
    manifest = Manifest.load(folder)
    assert manifest is not None and damage.is_intact(folder)
    refs, errors = index_folder(folder)
    assert not errors and {ref.key for ref in refs} == sound
    assert manifest.counts.get("kept", 0) == len(sound) and sum(manifest.counts.values()) == count
    check_complete(folder)


def write_videos(folder: Path, rng: random.Random) -> dict[str, bool]:
    """Files, every second one broken; whether each is sound, in the order of their names."""
    folder.mkdir()
    bases, odd, sound = [damage.good_sample(i) for i in range(2)], list(damage.ODD.values()), {}
    for i in range(COUNT):
        good = i % 2 == 0
        make = odd[i // 2 % len(odd)] if good else damage.DAMAGES[BROKEN_VIDEOS[i // 2 % len(BROKEN_VIDEOS)]]
        path = folder / f"{i:03d} {rng.choice(ODD_TEXTS[2:4])}\u2028.mp4"
        path.write_bytes(make(rng, rng.choice(bases))["mp4"])
        sound[str(path)] = good
    return sound


def write_prompts(path: Path, cuts_long: bool = False) -> list[bool]:
    """A .jsonl file, every second row broken; the second is too long, which is sound for a command that cuts it."""
    lines = []
    for i in range(COUNT):
        row = {"prompt": f"{PROMPT} {i} {ODD_TEXTS[i // 2 % len(ODD_TEXTS)]}", "id": i}
        lines.append(BROKEN_ROWS[i // 2 % len(BROKEN_ROWS)] if i % 2 else json.dumps(row, ensure_ascii=False))
    lines[1] = json.dumps({"prompt": "red " * 300})
    path.write_text("\n".join(lines), encoding="utf-8")
    return [i % 2 == 0 or (cuts_long and i == 1) for i in range(COUNT)]


def write_pairs(folder: Path, text: str, rng: random.Random) -> list[bool]:
    """A .jsonl file of videos with texts: broken videos, broken rows, and sound ones."""
    files, lines, sound = list(write_videos(folder / "videos", rng).items()), [], []
    good = next(path for path, is_good in files if is_good)
    wrong: list[dict[str, Any]] = [
        {text: None},
        {text: 3},
        {text: "red " * 300},
        {text: "half \ud83d"},
        {"video": "nowhere.mp4"},
        {"video": 7},
        {"colour": "red"},
        {"strength": 2},
        {"strength": "much"},
        {"strength": 0},
    ]
    for i, (path, is_good) in enumerate(files):
        row: dict[str, Any] = {"video": path, text: f"{PROMPT} {ODD_TEXTS[i % len(ODD_TEXTS)]}"}
        if is_good and i % 4:  # a sound video in a broken row
            row, is_good = {**row, "video": good, **wrong[i // 4 % len(wrong)]}, False
        cut = i > 0 and i % 11 == 0
        lines.append("{" if cut else json.dumps(row))
        sound.append(is_good and not cut)
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return sound


@pytest.mark.parametrize("task", ["caption", "generate", "joint", "edit", "qa"])
def test_predict(task: str, tmp_path: Path, model: Model) -> None:
    rng = random.Random(0)
    if task == "caption":
        sound, given = list(write_videos(tmp_path / "videos", rng).values()), f"videos={tmp_path}/videos"
    elif task in ("generate", "joint"):
        sound, given = write_prompts(tmp_path / "prompts.jsonl"), f"prompts={tmp_path}/prompts.jsonl"
    else:
        sound = write_pairs(tmp_path, "prompt" if task == "edit" else "question", rng)
        given = f"pairs={tmp_path}/pairs.jsonl"
    cli.main(
        [
            "predict",
            f"--config={REPO}/configs/{task}.yaml",
            f"--ckpt_path={model.checkpoint}",
            f"--data.{given}",
            "--data.batch_size=8",
            "--data.num_workers=0",
            f"--trainer.default_root_dir={tmp_path / 'out'}",
            "--trainer.enable_progress_bar=false",
            "--model.sampling.num_inference_steps=2",
            "--model.sampling.caption_steps=2",
        ]
    )
    check_rows(next((tmp_path / "out").glob("*.jsonl")), sound)


def test_evaluate(tmp_path: Path, model: Model) -> None:
    sound, output = write_prompts(tmp_path / "prompts.jsonl", cuts_long=True), tmp_path / "out"
    given = [f"--prompts={tmp_path}/prompts.jsonl", "--videos-per-prompt=1", "--steps=1", "--batch-size=8"]
    assert evaluate.main(["vbench", *given, f"--model={model.pipeline}", f"--output={output}"]) == 0
    check_rows(output / "videos.jsonl", sound)


def test_synthesize(tmp_path: Path) -> None:
    sound, output = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "out"
    args = ["--steps=1", "--guidance-scale=1", "--batch-size=8", "--min-caption=0", "--max-caption=9999"]
    assert synthesize.main([f"--prompts={tmp_path}/prompts.jsonl", f"--output={output}", *args]) == 0
    check_shards(output, {f"{i:08d}" for i, good in enumerate(sound) if good}, COUNT)


@pytest.mark.parametrize("command", ["evaluate", "synthesize", "encode"])
def test_nothing_but_broken_inputs_is_a_failure(command: str, tmp_path: Path, model: Model) -> None:
    (tmp_path / "broken.jsonl").write_text("{")
    damage.write_raw(tmp_path / "broken" / "0.tar", [("a", {"mp4": b"", "json": b"{}"})])
    main, arguments = {
        "evaluate": (evaluate.main, ["vbench", f"--prompts={tmp_path}/broken.jsonl", f"--model={model.pipeline}"]),
        "synthesize": (synthesize.main, [f"--prompts={tmp_path}/broken.jsonl"]),
        "encode": (encode.main, [f"--source={tmp_path}/broken", "--workers=1"]),
    }[command]
    with pytest.raises(SystemExit, match=r"^error: .*could be used"):
        main([*arguments, f"--output={tmp_path / 'out'}"])


def test_encode(tmp_path: Path) -> None:
    damaged = max(COUNT // 2, len(damage.SHARD_DAMAGES))
    sound, output = damage.write_damaged(tmp_path / "shards", damaged, COUNT - damaged), tmp_path / "out"
    assert encode.main([f"--source={tmp_path}/shards", f"--output={output}", "--workers=1"]) == 0
    check_shards(output, sound, COUNT)


@pytest.mark.parametrize(
    "kind",
    [["transformer"], ["pipeline"], ["wan"], ["export-official"], ["foundation"], ["import-official", "--wan"]],
    ids=" ".join,
)
def test_convert(kind: list[str], tmp_path: Path, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """What is refused is named and leaves nothing."""
    kind, contents = kind + [EMBEDDED_FOUNDATION] * (len(kind) - 1), model.checkpoint.read_bytes()
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "empty").mkdir()
    broken = {
        "empty.ckpt": b"",
        "text.ckpt": b"no weights",
        "cut.ckpt": contents[: len(contents) // 2],
        "noise.safetensors": random.Random(0).randbytes(5000),
        "zeros.pth": bytes(5000),
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    for name, state in {"list.ckpt": [1, 2], "other.ckpt": {"state_dict": {"a": torch.zeros(2)}}}.items():
        torch.save(state, tmp_path / name)
    for name in (*broken, "list.ckpt", "other.ckpt", "nowhere.ckpt", "empty", "file"):
        output = tmp_path / "out"
        assert convert.main([*kind, f"--checkpoint={tmp_path / name}", f"--output={output}"]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and name in printed
        assert not output.exists()
    if kind[0] == "transformer":
        assert convert.main([*kind, f"--checkpoint={model.checkpoint}", f"--output={tmp_path / 'out'}"]) == 0
        check_complete(tmp_path / "out")
