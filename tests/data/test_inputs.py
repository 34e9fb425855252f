from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer

from univigu.data.datamodule import VideoTextDataModule
from univigu.data.inputs import Input, PredictTask, find_inputs, find_videos
from univigu.data.sample import DataError
from univigu.data.synthesis import Pipeline, Synthesis, VideoOptions
from univigu.data.video import encode_mp4, read_video
from univigu.evaluation.vbench import ExportOptions, plan
from univigu.models.tokens import MAX_CHARACTERS, TextTooLongError, token_count, tokenize
from univigu.shapes import renderer, scenes
from univigu.training.parser import DATA, Parser


@pytest.fixture
def folder(tmp_path: Path, clips: list[dict[str, bytes]]) -> Path:
    """Videos of several sizes, and files that are none."""
    scene = scenes.sample_scene(3)
    (tmp_path / "a.mp4").write_bytes(clips[0]["mp4"])
    (tmp_path / "b-wide.mp4").write_bytes(encode_mp4(renderer.render(scene, 48, 130, 5)))
    (tmp_path / "c-tall.MP4").write_bytes(encode_mp4(renderer.render(scene, 102, 34, 20)))
    (tmp_path / "d-text.mp4").write_text("not a video")
    (tmp_path / "e-empty.mp4").write_bytes(b"")
    (tmp_path / "f-cut.mp4").write_bytes(clips[1]["mp4"][:400])
    (tmp_path / "readme.md").write_text("no video, and not called one")
    return tmp_path


class Collector(LightningModule):
    """Hands back the batches it is asked to predict."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return batch


def predict(foundation: str, **options: Any) -> list[dict[str, Any]]:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = VideoTextDataModule(foundation=foundation, **{"num_workers": 0, "batch_size": 4, **options})
    return trainer.predict(Collector(), datamodule=data)  # type: ignore[return-value]


def usable(batch: dict[str, Any]) -> list[bool]:
    return [error is None for error in batch["error"]]


def test_every_video_gives_a_row(foundation: str, folder: Path) -> None:
    batches = predict(foundation, videos=str(folder), num_workers=1)
    rows = [row for b in batches for row in zip(b["index"], b["row"], b["error"], strict=True)]
    assert [row[0] for row in rows] == list(range(6))
    assert [Path(row[1]["video"]).name[0] for row in rows] == list("abcdef")
    assert [row[2] is None for row in rows] == [True, True, True, False, False, False]
    for _, row, error in rows:
        assert error is None or row["video"] in error
    assert [batch["video"].shape for batch in batches] == [(3, 9, 3, 64, 64), (0, 9, 3, 64, 64)]
    assert all(batch["video"].dtype == torch.uint8 for batch in batches)
    assert torch.equal(batches[0]["video"][1], read_video(folder / "b-wide.mp4", 9, 64, 64))


def test_files_folders_patterns_and_lists(folder: Path) -> None:
    a, b = str(folder / "a.mp4"), str(folder / "b-wide.mp4")
    assert find_videos(a) == [a]
    assert find_videos(str(folder / "*-wide.*")) == [b]
    assert find_videos([b, str(folder / "?.mp4"), b]) == [b, a]
    assert find_videos(str(folder / "readme.md")) == [str(folder / "readme.md")]  # named outright
    (folder / "empty").mkdir()
    values: tuple[Any, ...] = (str(folder / "none.mp4"), str(folder / "*.xyz"), str(folder / "empty"), [])
    for value in values:
        with pytest.raises(DataError, match=r"data\.videos="):
            find_videos(value)
    with pytest.raises(DataError, match=r"none\.mp4"):
        find_videos([a, str(folder / "none.mp4")])


def test_prompts_that_do_not_fit_are_rows_too(foundation: str, tmp_path: Path) -> None:
    long = " ".join(["red"] * 70)
    (tmp_path / "p.txt").write_text(f"a red circle\n\n{long}\na blue ring\n")
    (batch,) = predict(foundation, prompts=str(tmp_path / "p.txt"), prompt_length=64)
    assert batch["index"] == [0, 1, 2]
    assert batch["row"] == [{"prompt": text} for text in ("a red circle", long, "a blue ring")]
    assert usable(batch) == [True, False, True] and "71 tokens, over the limit of 64" in batch["error"][1]


def read_prompts(value: str | list[str]) -> list[tuple[str, str | None]]:
    return [(row["prompt"], error) for row, error in find_inputs({"prompts": value}, None)]


def test_where_prompts_come_from(tmp_path: Path) -> None:
    assert read_prompts("a red circle") == [("a red circle", None)]
    assert read_prompts(["a", "b"]) == [("a", None), ("b", None)]
    lines = [json.dumps({"prompt": "a"}), "{", json.dumps({"text": "b"}), "", json.dumps({"prompt": "c"})]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    rows = read_prompts(str(tmp_path / "p.jsonl"))
    assert [row[0] for row in rows] == ["a", "", "", "c"]
    assert (
        rows[0][1] is None
        and "p.jsonl:2: not JSON" in str(rows[1][1])
        and "p.jsonl:3: expected a string 'prompt'" in str(rows[2][1])
    )
    for name, content in (("bom.txt", "first\nsecond"), ("bom.jsonl", '{"prompt": "first"}\n{"prompt": "second"}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")  # as Windows' editors write it
        assert read_prompts(str(tmp_path / name)) == [("first", None), ("second", None)]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    values: tuple[Any, ...] = (
        str(tmp_path / "none.txt"),
        str(tmp_path / "empty.txt"),
        str(tmp_path / "binary.txt"),
        [],
    )
    for value in values:
        with pytest.raises(DataError, match=r"data\.prompts="):
            read_prompts(value)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.JSON", "p.csv", "P.CSV", "p.parquet"])
def test_what_looks_like_a_path_is_never_a_prompt(name: str, tmp_path: Path, foundation: str) -> None:
    rows = [{"prompt": "a cat"}, {"prompt": " "}, {"prompt": "x" * (MAX_CHARACTERS + 1)}]
    path, kind = tmp_path / name, name.lower().rpartition(".")[2]
    missing = [str(tmp_path / f"none.{kind}"), f"none.{kind.upper()}", str(tmp_path)]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        prompts = [row["prompt"] for row in rows]
        lines = {"txt": prompts, "csv": ["prompt", *(f'"{p}"' for p in prompts)], "jsonl": map(json.dumps, rows)}
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(lines[kind]))
    errors = [None, *([] if kind == "txt" else ["an empty prompt"]), "characters, over 65536"]
    synthesis = Synthesis(str(path), Pipeline(foundation, VideoOptions(), "cpu"))
    videos = plan(str(path), None, ExportOptions(videos_per_prompt=1))
    for found in (read_prompts(str(path)), read_prompts([str(path)]), synthesis.rows):
        assert found[0] == ("a cat", None) and len(found) == len(errors)
        for (_, error), expected in zip(found[1:], errors[1:], strict=True):
            assert error is not None and error.endswith(str(expected))
    assert [row["error"] is None for row in videos] == [error is None for error in errors]
    for value in missing:
        readers = (
            read_prompts,
            lambda v: read_prompts(["a", v]),
            lambda v: Synthesis(v, Pipeline(foundation, VideoOptions(), "cpu")),
        )
        for read in (*readers, lambda v: plan(v, None, ExportOptions())):
            with pytest.raises(DataError, match=rf"prompts='{value}': (cannot be read|expected a file)"):
                read(value)


@pytest.mark.parametrize(
    "text", ["a: b.mp4", "close-up: a cat", "raw [1080p]", "[1080p] raw", "x:\ny", "12:30", 'say: "x"']
)
def test_texts_with_colons_and_brackets_reach_the_data(text: str) -> None:
    """YAML would take some of them for mappings; a list of one is the same as one."""
    parser = Parser()
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.set_defaults({"data": DATA})
    for name in ("prompts", "videos"):
        for args in ([f"--data.{name}={text}"], [f"--data.{name}", text]):
            given = getattr(parser.parse_args(args).data.init_args, name)
            assert given in (text, [text])
    assert parser.parse_args(['--data.prompts=["a: b", "c"]']).data.init_args.prompts == ["a: b", "c"]


def test_huge_texts_are_not_tokenised(foundation: str) -> None:
    tokenizer = VideoTextDataModule(foundation).tokenizer
    huge = "red " * 25_000_000
    start = time.perf_counter()
    with pytest.raises(TextTooLongError, match="caption has 100000000 characters, over 65536: 'red red"):
        tokenize(tokenizer, ["a", huge], 64, "caption")
    assert token_count(tokenizer, huge) == MAX_CHARACTERS // 4 + 1
    assert time.perf_counter() - start < 30  # minutes, and 8 GB, if they were


def test_names_and_hidden_files_mean_the_same_in_prediction_and_training(
    tmp_path: Path, clips: list[dict[str, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "val" / "raw [1080p] 100%: {a}"
    names = ["a: b.mp4", "[x]*.mp4", "below/c?.MP4"]
    (tmp_path / "elsewhere").mkdir()
    for path in (*(folder / name for name in names), tmp_path / "elsewhere" / "d.mp4", folder / ".hidden.mp4"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clips[0]["mp4"])
        path.with_suffix(".json").write_bytes(clips[0]["json"])
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    found = [str(Path(path).relative_to(folder)) for path in find_videos(str(folder))]
    assert found == sorted(["link/d.mp4", *names])
    data = VideoTextDataModule(shards=str(tmp_path), num_workers=0, batch_size=2, precompute=False)
    data.setup("validate")
    keys = [key for batch in data.val_dataloader() for key in batch["key"]]
    assert sorted(keys) == sorted(f"{folder.name}/{name.rpartition('.')[0]}" for name in found)
    assert caplog.text.count("1 hidden videos, shards or lists are left out") == 2  # of either folder
    assert find_videos(f"{folder}/*.mp4") == sorted(f"{folder}/{name}" for name in names[:2])
    assert find_videos(f"{folder}/**/*.[mM][pP]4") == [f"{folder}/{name}" for name in found]
    assert find_videos(f"{folder}/[[]x[]]*.mp4") == [f"{folder}/[x]*.mp4"] == find_videos(f"{folder}/[x]*.mp4")


@pytest.mark.parametrize("options", [{}, {"videos": "a.mp4", "prompts": "a"}, {"prompts": "a", "pairs": []}])
def test_prediction_needs_one_kind_of_input(foundation: str, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"data\.videos, data\.prompts, data\.pairs: prediction needs one of them"):
        VideoTextDataModule(foundation=foundation, **options).setup("predict")


# -------------------------------------------------------------------- pairs


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_mp4(renderer.render(scenes.sample_scene(3), 48, 130, 5)))
    return str(path)


def read_pairs(value: Any, task: PredictTask = "edit") -> list[Input]:
    return find_inputs({"pairs": value}, task)


def test_files_and_objects_say_the_same(clip: str, tmp_path: Path) -> None:
    rows = [{"video": clip, "prompt": "a ring, red"}, {"video": clip, "prompt": "b", "strength": 0.5}]
    (tmp_path / "e.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "e.csv").write_text(f'video,prompt,strength\n{clip},"a ring, red",\n{clip},b,0.5\n')
    expected = [
        ({"source": clip, "prompt": "a ring, red", "strength": 0.8, "replace": None}, None),
        ({"source": clip, "prompt": "b", "strength": 0.5, "replace": None}, None),
    ]
    assert read_pairs(rows) == expected
    assert read_pairs(rows[0]) == expected[:1]
    for name in ("e.jsonl", "e.csv"):
        assert read_pairs(str(tmp_path / name)) == expected
    assert read_pairs({"video": clip, "question": "what?"}, "qa") == [({"video": clip, "question": "what?"}, None)]


def test_one_text_for_many_videos(clip: str, tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(Path(clip).read_bytes())
    pairs = read_pairs({"video": str(tmp_path / "*.mp4"), "question": "what?"}, "qa")
    assert [Path(row["video"]).name for row, _ in pairs] == ["b.mp4", "clip.mp4"]
    assert {row["question"] for row, _ in pairs} == {"what?"}


def test_a_wrong_row_is_an_error_of_its_own(clip: str, tmp_path: Path) -> None:
    wrong = [
        ("{", "e.jsonl:1: not JSON"),
        ("[1]", "e.jsonl:2: expected an object, got [1]"),
        ({"prompt": "a"}, "e.jsonl:3: expected a string 'video', got None"),
        ({"video": clip, "prompt": " "}, "e.jsonl:4: an empty prompt"),
        ({"video": clip, "question": "a"}, "e.jsonl:5: expected a string 'prompt', got None"),
        ({"video": clip, "prompt": "a", "strengt": 1}, "e.jsonl:6: unknown field 'strengt'"),
        ({"video": clip, "prompt": "a", "strength": 1.5}, "e.jsonl:7: strength=1.5: expected over 0, at most 1"),
        ({"video": clip, "prompt": "a", "strength": "x"}, "e.jsonl:8: strength='x'"),
        ({"video": "nowhere.mp4", "prompt": "a"}, "e.jsonl:9: data.videos='nowhere.mp4': no such file"),
    ]
    path = tmp_path / "e.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row, _ in wrong]
    path.write_text("\n".join([*lines, json.dumps({"video": clip, "prompt": "fine"})]))
    *bad, good = read_pairs(str(path))
    assert good == ({"source": clip, "prompt": "fine", "strength": 0.8, "replace": None}, None)
    for (_, error), (_, message) in zip(bad, wrong, strict=True):
        assert error is not None and message in error
    (edit,) = read_pairs({"video": clip, "replace": {"red": "blue"}})
    assert edit == ({"source": clip, "prompt": None, "strength": 0.8, "replace": {"red": "blue"}}, None)
    for words in ({}, "red", {"red": 1}, {"red": "\ud83d"}):
        ((_, error),) = read_pairs({"video": clip, "prompt": "a", "replace": words})
        assert error is not None and f"replace={words!r}: expected words" in error
    ((_, error),) = read_pairs({"video": clip, "replace": None})  # would change nothing
    assert error is not None and "expected a string 'prompt', got None" in error
    ((_, error),) = read_pairs({"video": clip, "question": "a", "replace": {"a": "b"}}, "qa")
    assert "unknown field 'replace'" in str(error)
    assert bad[6][0] == {
        "source": clip,
        "prompt": "a",
        "strength": None,
        "replace": None,
    }  # what is known of it is kept
    ((_, error),) = read_pairs({"video": clip, "question": "a", "strength": 0.5}, "qa")
    assert "unknown field 'strength'" in str(error)


@pytest.mark.parametrize("value", ["none.jsonl", "edits.txt", "empty.csv", []])
def test_what_holds_no_pair_is_named(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.csv").write_text("video,prompt\n")
    with pytest.raises(DataError, match=r"data\.pairs="):
        read_pairs(value)


def test_batches_of_pairs(foundation: str, clip: str, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_text("not a video")
    rows = [
        {"video": clip, "prompt": "a red ring"},
        {"video": str(tmp_path / "broken.mp4"), "prompt": "a"},
        {"video": clip, "prompt": "red " * 70},
        {"video": clip, "prompt": "a", "strength": 0.5},
    ]
    (batch,) = predict(foundation, pairs=rows, predict_task="edit", prompt_length=64)
    assert usable(batch) == [True, False, False, True] and batch["index"] == [0, 1, 2, 3]
    assert [row["strength"] for row in batch["row"]] == [0.8, 0.8, 0.8, 0.5]
    assert [row["prompt"] for row in batch["row"]] == [row["prompt"] for row in rows]
    assert "broken.mp4: not a readable video" in batch["error"][1] and "over the limit of 64" in batch["error"][2]
    assert batch["video"].shape == (2, 9, 3, 64, 64) and batch["video"].dtype == torch.uint8


def test_the_questions_about_a_video_come_together(foundation: str, clip: str, tmp_path: Path) -> None:
    """With their video once, and at most 16 of them, whatever the batch size."""
    (tmp_path / "broken.mp4").write_text("not a video")
    other = tmp_path / "other.mp4"
    other.write_bytes(Path(clip).read_bytes())
    asked = [(clip, "a"), (str(tmp_path / "broken.mp4"), "a"), (str(other), "a"), (clip, "red " * 70), (clip, "b")]
    rows = [{"video": video, "question": text} for video, text in asked]
    (batch,) = predict(foundation, pairs=rows, predict_task="qa", prompt_length=64)
    assert batch["index"] == [0, 3, 4, 1, 2] and usable(batch) == [True, False, True, False, True]
    assert len(batch["video"]) == 2 and [batch["clip"][i] for i in (0, 2, 4)] == [0, 0, 1]
    assert "broken.mp4: not a readable video" in batch["error"][3] and "over the limit of 64" in batch["error"][1]
    many = [{"video": clip, "question": f"{number}"} for number in range(20)]
    batches = predict(foundation, pairs=many, predict_task="qa", batch_size=1)
    assert [batch["index"] for batch in batches] == [list(range(16)), list(range(16, 20))]


def test_arguments_that_do_not_fit(foundation: str, clip: str) -> None:
    for task, options in (("edit", {"videos": clip}), ("qa", {"prompts": "a"}), ("caption", {"pairs": [{}]})):
        with pytest.raises(DataError, match=rf"model\.predict_task='{task}' needs data\.(pairs|videos), not data\."):
            VideoTextDataModule(foundation, predict_task=task, **options).setup("predict")  # type: ignore[arg-type]
