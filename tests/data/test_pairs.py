"""Videos with a prompt or a question to each: every row comes out, whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from univigu.data.datamodule import VideoTextDataModule
from univigu.data.inputs import PredictionInput, read_pairs
from univigu.data.sample import DataError
from univigu.data.video import encode_mp4
from univigu.shapes import renderer, scenes


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_mp4(renderer.render(scenes.sample_scene(3), 48, 130, 5)))
    return str(path)


def test_files_and_objects_say_the_same(clip: str, tmp_path: Path) -> None:
    rows = [{"video": clip, "prompt": "a ring, red"}, {"video": clip, "prompt": "b", "strength": 0.5}]
    (tmp_path / "e.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "e.csv").write_text(f'video,prompt,strength\n{clip},"a ring, red",\n{clip},b,0.5\n')
    expected = [PredictionInput(clip, "a ring, red", 0.8), PredictionInput(clip, "b", 0.5)]
    assert read_pairs(rows, "prompt") == expected
    assert read_pairs(rows[0], "prompt") == expected[:1]
    for name in ("e.jsonl", "e.csv"):
        assert read_pairs(str(tmp_path / name), "prompt") == expected
    assert read_pairs({"video": clip, "question": "what?"}, "question") == [PredictionInput(clip, "what?")]


def test_one_text_for_many_videos(clip: str, tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(Path(clip).read_bytes())
    pairs = read_pairs({"video": str(tmp_path / "*.mp4"), "question": "what?"}, "question")
    assert [Path(pair.video).name for pair in pairs] == ["b.mp4", "clip.mp4"]
    assert {pair.text for pair in pairs} == {"what?"}


def test_a_wrong_row_is_an_error_of_its_own(clip: str, tmp_path: Path) -> None:
    wrong = [
        ("{", "e.jsonl:1: not JSON"),
        ("[1]", "e.jsonl:2: expected an object, got [1]"),
        ({"prompt": "a"}, "e.jsonl:3: expected a string 'video', got None"),
        ({"video": clip, "prompt": " "}, "e.jsonl:4: prompt=' ': expected a non-empty string"),
        ({"video": clip, "question": "a"}, "e.jsonl:5: expected a string 'prompt', got None"),
        ({"video": clip, "prompt": "a", "strengt": 1}, "e.jsonl:6: unknown field 'strengt'"),
        ({"video": clip, "prompt": "a", "strength": 1.5}, "e.jsonl:7: strength=1.5: expected over 0, at most 1"),
        ({"video": clip, "prompt": "a", "strength": "x"}, "e.jsonl:8: strength='x'"),
        ({"video": "nowhere.mp4", "prompt": "a"}, "e.jsonl:9: data.videos='nowhere.mp4': no such file"),
    ]
    path = tmp_path / "e.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row, _ in wrong]
    path.write_text("\n".join([*lines, json.dumps({"video": clip, "prompt": "fine"})]))
    *bad, good = read_pairs(str(path), "prompt")
    assert good == PredictionInput(clip, "fine", 0.8)
    for pair, (_, message) in zip(bad, wrong, strict=True):
        assert pair.error is not None and message in pair.error
    assert bad[6].video == clip and bad[6].text == "a"  # what is known of it is kept
    (question,) = read_pairs({"video": clip, "question": "a", "strength": 0.5}, "question")
    assert "unknown field 'strength'" in str(question.error)


@pytest.mark.parametrize("value", ["none.jsonl", "edits.txt", "empty.csv", []])
def test_what_holds_no_pair_is_named(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.csv").write_text("video,prompt\n")
    with pytest.raises(DataError, match=r"data\.pairs="):
        read_pairs(value, "prompt")


class Collector(LightningModule):
    """Hands back the batches it is asked to predict."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return batch


def test_batches(foundation: str, clip: str, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_text("not a video")
    rows = [
        {"video": clip, "prompt": "a red ring"},
        {"video": str(tmp_path / "broken.mp4"), "prompt": "a"},
        {"video": clip, "prompt": "red " * 70},
        {"video": clip, "prompt": "a", "strength": 0.5},
    ]
    data = VideoTextDataModule(
        foundation, pairs=rows, predict_task="edit", prompt_length=64, num_workers=0, batch_size=4
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (batch,) = trainer.predict(Collector(), datamodule=data)  # type: ignore[misc]
    assert batch["ok"] == [True, False, False, True] and batch["index"] == [0, 1, 2, 3]
    assert batch["strength"] == [0.8, 0.8, 0.8, 0.5] and batch["text"] == [row["prompt"] for row in rows]
    assert "broken.mp4: not a readable video" in batch["error"][1] and "over the limit of 64" in batch["error"][2]
    assert batch["video"].shape == (2, 9, 3, 64, 64) and batch["video"].dtype == torch.uint8


def test_arguments_that_do_not_fit(foundation: str, clip: str) -> None:
    for task, options in (("edit", {"videos": clip}), ("qa", {"prompts": "a"}), ("caption", {"pairs": [{}]})):
        with pytest.raises(DataError, match=rf"model\.predict_task='{task}' needs data\.(pairs|videos), not data\."):
            VideoTextDataModule(foundation, predict_task=task, **options).setup("predict")  # type: ignore[arg-type]
