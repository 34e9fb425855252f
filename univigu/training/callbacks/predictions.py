"""Writes the results of ``lightning predict``: captions.jsonl, or mp4 files with a manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console

from univigu.data.rows import to_line
from univigu.data.sample import DataError
from univigu.data.shards import replacing
from univigu.data.video import encode_mp4

LISTS = {"caption": "captions.jsonl", "qa": "answers.jsonl"}
"""Names of the lists of tasks that give only text; of others it is ``MANIFEST``."""
MANIFEST = "manifest.jsonl"
VIDEO = re.compile(r"\d{5,}\.mp4|\.\d{5,}\.mp4\.\w+\.tmp")


class PredictionWriter(BasePredictionWriter):
    """One JSON object a line for every input, in the order of the inputs, failed ones included.

    Captions go to ``captions.jsonl`` (video, caption, error, seconds, seed), answers to ``answers.jsonl`` (with the
    question), videos to ``videos/00000.mp4`` and so on, with ``manifest.jsonl`` (prompt, video, caption, error,
    seconds, seed; of edits also source, strength and replace).  Files are written atomically.
    Results of an earlier call of this kind are removed when prediction starts.

    Args:
        output_dir: folder of the files; None is ``trainer.default_root_dir``.
        fps: frames a second of written videos.
    """

    failed = False
    """Whether no input could be used."""
    _folder: Path
    _list: str
    _rows: dict[int, dict[str, Any]]

    def __init__(self, output_dir: str | None = None, fps: int = 8) -> None:
        super().__init__(write_interval="batch")
        self.output_dir, self.fps = output_dir, fps

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Remove the results of an earlier call; raises DataError if some of them are inputs of this one."""
        folder = Path(self.output_dir or trainer.default_root_dir)
        self._list = LISTS.get(pl_module.predict_task, MANIFEST)
        old = [folder / self._list]
        if self._list == MANIFEST:
            old += sorted(path for path in (folder / "videos").glob("*") if VIDEO.fullmatch(path.name))
        dataset = getattr(trainer.predict_dataloaders, "dataset", None)
        inputs = {os.path.realpath(item.video) for item in getattr(dataset, "inputs", ()) if item.video}
        if read := [path for path in old if os.path.realpath(path) in inputs]:
            raise DataError(f"{read[0]}: is to be read, but would be replaced; choose another trainer.default_root_dir")
        if trainer.is_global_zero:
            for path in old:
                path.unlink(missing_ok=True)
        trainer.strategy.barrier("earlier predictions removed")
        self._folder, self._rows = folder, {}

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
        for item in prediction:
            if item.video is not None:
                path = self._folder / "videos" / f"{item.index:05d}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    temporary.write_bytes(encode_mp4(item.video, self.fps))
                item.row["video"] = str(path)
            self._rows[item.index] = item.row

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        found: list[Any] = [self._rows] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(found, self._rows)
        if trainer.is_global_zero:
            rows = {number: row for part in found for number, row in part.items()}
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._folder / self._list) as temporary:
                temporary.write_text("".join(to_line(rows[number]) for number in sorted(rows)), encoding="utf-8")
            failed = sum(row["error"] is not None for row in rows.values())
            self.failed = failed == len(rows)
            text = f"wrote {self._folder / self._list}: {len(rows)} rows, {failed} of them errors"
            Console().print(text, soft_wrap=True, highlight=False)
