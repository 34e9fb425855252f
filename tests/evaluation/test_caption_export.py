"""The prediction file of DREAM-1K, read the way its scorer reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from univigu import UniViGUPipeline
from univigu.data.sample import DataError
from univigu.data.video import read_video
from univigu.evaluation.caption_export import FAILED, read_listing

Evaluate = Callable[[list[str]], int]
Capture = pytest.CaptureFixture[str]
SIZE = ["--height=32", "--width=32", "--num-frames=5", "--caption-steps=3", "--prompt-length=16", "--device=cpu"]
SIZE += ["--text-order=random"]  # random weights are certain of the same tokens for every clip


def command(name: str, model: str, clips: Path, output: Path, *more: str) -> list[str]:
    return [name, f"--videos={clips}", f"--model={model}", f"--output={output}", *SIZE, *more]


def captions(output: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "captions.jsonl").read_text().splitlines()]
    return {row["key"]: row for row in rows}


@pytest.fixture
def dream(tmp_path: Path) -> Path:
    """Rows as of tarsier's data/annotations/DREAM-1k.jsonl; there is no fourth clip."""
    path = tmp_path / "DREAM-1k.jsonl"
    rows = [
        {
            "idx": i,
            "dataset": "DREAM/movie_animation",
            "vid": i,
            "video_file": "<placeholder>",
            "text": {"prompt": "<video>\nDescribe the video in detail.", "response": f"Cat {i} jumps."},
            "extra_info": {"n_subjects": 1, "n_shots": 1, "n_events": 1, "events": [f"Cat {i} jumps."]},
        }
        for i in range(1, 5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tarsier_reads(path: Path, dataset_name: str) -> list[dict[str, Any]]:
    """As tarsier's evaluation/evaluate.py (read_dataset) and its DREAM metric take the rows."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["dataset"].split("/")[0] == dataset_name:
            found.append({**row["text"], "idx": f"{row['dataset']}_{row['idx']}", **row["extra_info"]})
    return found


def test_dream1k_for_tarsier(dream: Path, model: str, clips: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    output = tmp_path / "run"
    assert evaluate(command("dream1k", model, clips, output, f"--annotations={dream}")) == 0
    rows = tarsier_reads(output / "tarsier" / "predictions.jsonl", "DREAM")
    assert [row["response"] for row in rows] == [f"Cat {i} jumps." for i in range(1, 5)]
    assert all(row["events"] and row["n_subjects"] == 1 for row in rows)
    assert [row["prediction"] == FAILED for row in rows] == [False, True, False, True]
    ours = captions(output)
    assert ours["1"]["caption"] == rows[0]["prediction"] and ours["1"]["error"] is None
    assert ours["1"]["caption"] != ours["3"]["caption"]
    assert "2.MP4: not a readable video" in ours["2"]["error"]
    assert ours["4"]["error"] == "there is no video of the name '4'"
    pipe = UniViGUPipeline.from_pretrained(model)
    frames = read_video(clips / "3.mp4", 5, 32, 32).float() / 255
    text = pipe.caption(
        frames[None],
        generator=[torch.Generator().manual_seed(ours["3"]["seed"])],
        caption_steps=3,
        text_order="random",
        max_sequence_length=16,
    ).text
    assert text == [rows[2]["prediction"]]


def test_many_clips_half_of_them_broken(
    model: str, clips: Path, tmp_path: Path, evaluate: Evaluate, capsys: Capture
) -> None:
    """Every file has its row; names may be of any kind."""
    good, folder, output = (clips / "1.mp4").read_bytes(), tmp_path / "clips", tmp_path / "run"
    folder.mkdir()
    damages = (b"", b"no video", good[: len(good) // 3], b"\0" * 4000, bytes(range(256)) * 20)
    for i in range(35):
        (folder / f"clip {i} ü\u2028.mp4").write_bytes(good if i % 2 else damages[i // 2 % 5])
    listing = tmp_path / "list.jsonl"
    listing.write_text("".join(json.dumps({"vid": f"clip {i} ü\u2028", "text": {}}) + "\n" for i in range(35)))
    more = f"--annotations={listing}", "--caption-steps=1", "--batch-size=8"
    assert evaluate(command("dream1k", model, folder, output, *more)) == 0
    assert "complete: 35 rows, 18 of them errors" in capsys.readouterr().out
    rows = [json.loads(line) for line in (output / "captions.jsonl").read_text().split("\n")[:-1]]
    assert len({row["key"] for row in rows}) == 35
    for row in rows:
        number = int(row["key"].split()[1])
        assert (row["error"] is None) == bool(number % 2)
    assert (output / "tarsier" / "predictions.jsonl").read_text().count(FAILED) == 18


def test_batches_give_the_same(dream: Path, model: str, clips: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    one, four = tmp_path / "one", tmp_path / "four"
    for folder, size in ((one, 1), (four, 4)):
        more = [f"--annotations={dream}", f"--batch-size={size}"]
        assert evaluate(command("dream1k", model, clips, folder, *more)) == 0
    assert captions(four) == captions(one)


def test_failures_are_tried_again(dream: Path, model: str, clips: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    shutil.copytree(clips, tmp_path / "clips")
    arguments = command("dream1k", model, tmp_path / "clips", tmp_path / "run", f"--annotations={dream}")
    assert evaluate(arguments) == 0
    before = captions(tmp_path / "run")
    assert "not a readable video" in before["2"]["error"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / ".parts").glob("*.jsonl")}
    shutil.copy(clips / "1.mp4", tmp_path / "clips" / "2.MP4")
    assert evaluate(arguments) == 0
    after = captions(tmp_path / "run")
    assert after["2"]["error"] is None and after["2"]["caption"] and after["1"] == before["1"]
    assert [path.stat().st_mtime_ns == time for path, time in sorted(times.items())] == [True, False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--annotations=/nowhere.jsonl", "--annotations='/nowhere.jsonl': cannot be read"),
        ("--annotations={clips}/1.mp4", "1.mp4': expected a file of .jsonl, .json, "),
        ("--annotations={clips}/vid.jsonl", 'an object "text"'),
        ("--videos=/nowhere", "data.videos='/nowhere': no such file or folder"),
        ("--model=/nowhere", "--model='/nowhere': no folder of a diffusers pipeline"),
        ("--batch-size=0", "batch_size=0: expected at least 1"),
        ("--text-order=backwards", "sampling.text_order='backwards'"),
    ],
)
def test_mistakes_are_told_in_a_line(
    dream: Path, clips: Path, model: str, tmp_path: Path, evaluate: Evaluate, capsys: Capture, change: str, message: str
) -> None:
    assert (
        evaluate(
            [*command("dream1k", model, clips, tmp_path / "run", f"--annotations={dream}"), change.format(clips=clips)]
        )
        == 2
    )
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_a_mark_of_byte_order_is_no_part_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"vid": "1", "text": {}}', encoding="utf-8-sig")
    assert read_listing(str(tmp_path / "list.jsonl"))[0]["vid"] == "1"


@pytest.mark.parametrize("text", ["[]\n", '{"other": 1, "text": {}}\n', "not json\n", ""])
def test_lists_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"--annotations='.*list\.jsonl': "):
        read_listing(f"{tmp_path}/list.jsonl")
