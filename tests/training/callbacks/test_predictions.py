"""What prediction leaves in its folder: whole files, and those of one call alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from tests.conftest import run_ranks
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.inputs import PredictTask
from univigu.data.sample import DataError
from univigu.data.video import encode_mp4, read_video
from univigu.training.callbacks import PredictionWriter
from univigu.training.prediction import Row


class Painter(LightningModule):
    """Makes a clip of one colour for each input, and a text; fails at the input of a number."""

    def __init__(self, predict_task: PredictTask = "generate", fail_at: int | None = None) -> None:
        super().__init__()
        self.predict_task, self.fail_at = predict_task, fail_at

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[int, Row]]:
        if self.fail_at in batch["index"]:
            raise RuntimeError("killed")
        makes = self.predict_task not in ("caption", "qa")
        return [
            (i, {"prompt": row.get("prompt"), "video": _clip(i) if makes else None, "error": None})
            for i, row in zip(batch["index"], batch["row"], strict=True)
        ]


def _clip(number: int) -> torch.Tensor:
    return torch.full((5, 3, 16, 16), 40 * number, dtype=torch.uint8)


def predict(folder: Path, module: Painter, devices: int = 1, prompts: Any = None, **inputs: Any) -> None:
    inputs["prompts"] = prompts
    data = VideoTextDataModule(batch_size=1, num_workers=0, predict_task=module.predict_task, **inputs)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
        callbacks=[PredictionWriter()],
    )
    trainer.predict(module, datamodule=data, return_predictions=False)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def numbered(count: int) -> set[str]:
    return {f"videos/{i:05d}.mp4" for i in range(count)}


def test_a_shorter_list_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    predict(tmp_path, Painter(), prompts=["a", "b", "c"])
    assert names(tmp_path) == {"manifest.jsonl", *numbered(3)}
    own = {"videos/mine.mp4", "videos/1.mp4", "videos/00002.webm", "captions.jsonl", "00000.mp4"}  # no call's videos
    for name in own:
        (tmp_path / name).write_text("mine")
    (tmp_path / "videos" / ".00007.mp4.12ab.tmp").write_text("half")  # of a killed call
    predict(tmp_path, Painter("joint"), prompts=["c"])
    assert names(tmp_path) == {"manifest.jsonl", *numbered(1), *own}
    assert all((tmp_path / name).read_text() == "mine" for name in own)
    (row,) = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert row["prompt"] == "c" and row["video"] == str(tmp_path / "videos/00000.mp4")
    assert read_video(tmp_path / "videos/00000.mp4", 5, 16, 16).float().mean() < 3


def test_a_killed_call_leaves_no_list_of_an_earlier_one(tmp_path: Path) -> None:
    predict(tmp_path, Painter(), prompts=["a", "b", "c"])
    with pytest.raises(RuntimeError, match="killed"):
        predict(tmp_path, Painter(fail_at=1), prompts=["d", "e", "f"])
    assert names(tmp_path) == {"videos/00000.mp4"}
    predict(tmp_path, Painter(), prompts=["d", "e"])
    assert names(tmp_path) == {"manifest.jsonl", *numbered(2)}


def test_a_video_appears_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        real(path, content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        predict(tmp_path, Painter(), prompts=["a"])
    assert not list(tmp_path.rglob("*.mp4"))
    monkeypatch.undo()
    predict(tmp_path, Painter(), prompts=["a"])
    assert names(tmp_path) == {"manifest.jsonl", *numbered(1)}


def test_captions_replace_captions_alone(tmp_path: Path) -> None:
    predict(tmp_path, Painter(), prompts=["a", "b"])
    kept = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    predict(tmp_path, Painter("caption"), videos=str(tmp_path / "videos"))  # of the very videos that lie there
    assert names(tmp_path) == {"captions.jsonl", *kept}
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    with pytest.raises(RuntimeError, match="killed"):
        predict(tmp_path, Painter("caption", fail_at=0), videos=str(tmp_path / "videos"))
    assert names(tmp_path) == kept.keys()


def test_what_is_to_be_read_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "00000.mp4").write_bytes(encode_mp4(_clip(1)))
    pairs = [{"video": str(tmp_path / "videos" / ".." / "videos" / "00000.mp4"), "prompt": "a"}]
    with pytest.raises(DataError, match=r"videos/00000\.mp4: is to be read, but would be replaced; choose another"):
        predict(tmp_path, Painter("edit"), pairs=pairs)
    assert names(tmp_path) == {"videos/00000.mp4"}
    predict(tmp_path / "other", Painter("edit"), pairs=pairs)
    assert names(tmp_path / "other") == {"manifest.jsonl", *numbered(1)}


def test_several_processes_clear_the_folder_once(tmp_path: Path) -> None:
    predict(tmp_path, Painter(), prompts=[f"{i}" for i in range(7)])
    run_ranks(predict, tmp_path, Painter(), 2, list("abcd"))
    assert names(tmp_path) == {"manifest.jsonl", *numbered(4)}
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list("abcd")
