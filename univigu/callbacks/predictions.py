"""Writes what ``lightning predict`` makes: captions.jsonl, or mp4 files with a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console

from univigu.data.video import encode_mp4
from univigu.jsonl import split_lines, to_line

NAMES = {"caption": "captions.jsonl", "qa": "answers.jsonl"}  # tasks that make text alone


class PredictionWriter(BasePredictionWriter):
    """One JSON object a line for every input, in the order of the inputs, failed ones included.

    Captions go to ``captions.jsonl`` (video, caption, error, seconds, seed), answers to ``answers.jsonl`` (with the
    question).  Made videos go to ``videos/00000.mp4`` and so on, with ``manifest.jsonl`` (prompt, video, caption,
    error, seconds, seed; of edits: source, prompt, strength, video, error, seconds, seed).
    The file appears under its name when it is whole.

    Args:
        output_dir: where; None is ``trainer.default_root_dir``.
        fps: frames a second of written videos.
    """

    def __init__(self, output_dir: str | None = None, fps: int = 8) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = output_dir
        self.fps = fps

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.output_dir or trainer.default_root_dir)

    def _part(self, trainer: Trainer, rank: int) -> Path:
        return self._folder(trainer) / f".predictions-{rank}.part"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder(trainer).mkdir(parents=True, exist_ok=True)
        self._part(trainer, trainer.global_rank).write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        with self._part(trainer, trainer.global_rank).open("a", encoding="utf-8") as file:
            for item in prediction:
                row = self._row(trainer, pl_module, item)
                file.write(to_line({"index": item.index, **row}))

    def _row(self, trainer: Trainer, pl_module: Any, item: Any) -> dict[str, Any]:
        rest = {"error": item.error, "seconds": round(item.seconds, 4), "seed": item.seed}
        if pl_module.predict_task == "caption":
            return {"video": item.source, "caption": item.text, **rest}
        if pl_module.predict_task == "qa":
            return {"video": item.source, "question": item.condition, "answer": item.text, **rest}
        path = None
        if item.video is not None:
            path = self._folder(trainer) / "videos" / f"{item.index:05d}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode_mp4(item.video, self.fps))
        made = path and str(path)
        if pl_module.predict_task == "edit":
            return {
                "source": item.source, "prompt": item.condition, "strength": item.strength, "video": made, **rest
            }  # fmt: skip
        return {"prompt": item.source, "video": made, "caption": item.text, **rest}

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.strategy.barrier("predictions written")
        if not trainer.is_global_zero:
            return
        parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
        rows: dict[int, dict[str, Any]] = {}  # a sampler that evens out the ranks may repeat an item
        for part in parts:
            for line in split_lines(part.read_text(encoding="utf-8"))[:-1]:
                row = json.loads(line)
                rows[row.pop("index")] = row
        target = self._folder(trainer) / NAMES.get(pl_module.predict_task, "manifest.jsonl")
        whole = target.with_suffix(".tmp")
        whole.write_text("".join(to_line(rows[i]) for i in sorted(rows)), encoding="utf-8")
        os.replace(whole, target)
        for part in parts:
            part.unlink()
        failed = sum(row["error"] is not None for row in rows.values())
        Console().print(f"wrote {target}: {len(rows)} rows, {failed} of them errors", soft_wrap=True, highlight=False)
