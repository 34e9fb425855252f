"""The prediction files of DREAM-1K and VDC, read the way their scorers read them."""

from __future__ import annotations

import json
import os
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


def test_vdc_without_a_list_for_aurora(model: str, clips: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    """post_eval/process_vdc_result.py takes doc.video_id and resps[0][0] of each item."""
    output = tmp_path / "run"
    assert evaluate(command("vdc", model, clips, output, "--category=short")) == 0
    data = json.loads((output / "aurora" / "short.json").read_text())
    found = {item["doc"]["video_id"]: item["resps"][0][0] for item in data}
    ours = captions(output)
    assert found == {"1": ours["1"]["caption"], "2": "", "3": ours["3"]["caption"]}
    assert not (output / "lmms-eval").exists()  # without its order nothing says which document is which


def test_many_clips_half_of_them_broken(
    model: str, clips: Path, tmp_path: Path, evaluate: Evaluate, capsys: Capture
) -> None:
    """Every file has its row; names may be of any kind, even bytes that are no text."""
    good, folder, output = (clips / "1.mp4").read_bytes(), tmp_path / "clips", tmp_path / "run"
    folder.mkdir()
    damages = (b"", b"no video", good[: len(good) // 3], b"\0" * 4000, bytes(range(256)) * 20)
    for i in range(35):
        name = os.fsencode(folder) + f"/clip {i} ü\u2028".encode() + (b"\x80" if i % 7 == 0 else b"") + b".mp4"
        Path(os.fsdecode(name)).write_bytes(good if i % 2 else damages[i // 2 % 5])
    assert evaluate(command("vdc", model, folder, output, "--caption-steps=1", "--batch-size=8")) == 0
    assert "complete: 35 rows, 18 of them errors" in capsys.readouterr().out
    rows = [json.loads(line) for line in (output / "captions.jsonl").read_text().split("\n")[:-1]]
    assert len({row["key"] for row in rows}) == 35
    for row in rows:
        number = int(row["key"].split()[1])
        assert (row["error"] is None) == bool(number % 2)
    assert len(json.loads((output / "aurora" / "detailed.json").read_text())) == 35


@pytest.mark.parametrize("form", ["lmms-eval", "aurora"])
def test_vdc_for_lmms_eval(form: str, model: str, clips: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    """lmms_eval/models/simple/from_log.py takes logs by task and document number."""
    listing, output = tmp_path / "list.jsonl", tmp_path / "run"
    names = ["3", "1"]
    rows = [{"video_name": n, "qa_list": []} if form == "lmms-eval" else {n: [{"question": "?"}]} for n in names]
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(command("vdc", model, clips, output, f"--annotations={listing}", "--category=camera")) == 0
    log = json.loads((output / "lmms-eval" / "vdc_camera.json").read_text())
    assert log["args"]["model"] == "univigu" and log["args"]["limit"] is None and log["args"]["model_args"]
    assert log["model_configs"]["task"] == "vdc_camera"
    ours = captions(output)
    assert {item["doc_id"]: item["resps"][0][0] for item in log["logs"]} == {
        i: ours[name]["caption"] for i, name in enumerate(names)
    }


def test_processes_and_batches_give_the_same(
    dream: Path, model: str, clips: Path, tmp_path: Path, evaluate: Evaluate, capsys: Capture
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert evaluate(command("dream1k", model, clips, one, f"--annotations={dream}", "--batch-size=4")) == 0
    for rank in (1, 0):
        assert not (two / "captions.jsonl").exists()
        ranks = [f"--rank={rank}", "--world-size=2"]
        assert evaluate(command("dream1k", model, clips, two, f"--annotations={dream}", *ranks)) == 0
    assert "this process is done, others are not" in capsys.readouterr().out
    assert captions(two) == captions(one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--annotations=/nowhere.jsonl", "--annotations='/nowhere.jsonl': cannot be read"),
        ("--annotations={clips}/1.mp4", "1.mp4': expected a file of .jsonl, .json, "),
        ("--annotations={clips}/vid.jsonl", 'expected rows with an object "text"'),
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


@pytest.mark.parametrize("name", ["list.jsonl", "list.json"])
def test_a_mark_of_byte_order_is_no_part_of_a_list(name: str, tmp_path: Path) -> None:
    content = {"list.jsonl": '{"vid": "1"}', "list.json": '[{"vid": "1"}]'}[name]
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_listing(str(tmp_path / name), ("vid", "video"), "--annotations")[1] == ["1"]


@pytest.mark.parametrize("text", ["[]\n", '{"other": 1}\n', "not json\n", ""])
def test_lists_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"--annotations='.*list\.jsonl': "):
        read_listing(f"{tmp_path}/list.jsonl", ("vid", "video"), "--annotations")
