from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from univigu.data.datamodule import VideoTextDataModule
from univigu.data.inputs import find_videos, read_prompts
from univigu.data.sample import DataError
from univigu.data.video import encode_mp4
from univigu.shapes import renderer, scenes


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


def test_every_video_gives_a_row(foundation: str, folder: Path) -> None:
    batches = predict(foundation, videos=str(folder))
    rows = [row for b in batches for row in zip(b["index"], b["path"], b["ok"], b["error"], strict=True)]
    assert [row[0] for row in rows] == list(range(6))
    assert [Path(row[1]).name[0] for row in rows] == list("abcdef")
    assert [row[2] for row in rows] == [True, True, True, False, False, False]
    for _, path, ok, error in rows:
        assert (error is None) == ok and (ok or path in error)
    assert [batch["video"].shape for batch in batches] == [(3, 9, 3, 64, 64), (0, 9, 3, 64, 64)]
    assert all(batch["video"].dtype == torch.uint8 for batch in batches)


def test_workers_read_videos_too(foundation: str, folder: Path) -> None:
    (batch,) = predict(foundation, videos=str(folder / "[ab]*.mp4"), num_workers=1)
    (expected,) = predict(foundation, videos=str(folder / "[ab]*.mp4"))
    assert batch["ok"] == [True, True] and torch.equal(batch["video"], expected["video"])


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
    assert batch["index"] == [0, 1, 2] and batch["prompt"] == ["a red circle", long, "a blue ring"]
    assert batch["ok"] == [True, False, True] and "71 tokens, over the limit of 64" in batch["error"][1]


def test_where_prompts_come_from(tmp_path: Path) -> None:
    assert read_prompts("a red circle") == [("a red circle", None)]
    assert read_prompts(["a", "b.txt"]) == [("a", None), ("b.txt", None)]
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


@pytest.mark.parametrize("options", [{}, {"videos": "a.mp4", "prompts": "a"}, {"prompts": "a", "pairs": []}])
def test_prediction_needs_one_kind_of_input(foundation: str, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"data\.videos, data\.prompts, data\.pairs: prediction needs one of them"):
        VideoTextDataModule(foundation=foundation, **options).setup("predict")
