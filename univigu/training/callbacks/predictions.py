"""Writes what ``lightning predict`` makes: captions.jsonl, or mp4 files with a manifest."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console

from univigu.data.rows import split_lines, to_line
from univigu.data.sample import DataError
from univigu.data.video import encode_mp4

NAMES = {"caption": "captions.jsonl", "qa": "answers.jsonl"}  # tasks that make text alone
MANIFEST = "manifest.jsonl"
VIDEO = re.compile(r"\d{5,}\.mp4|\.\d{5,}\.mp4\.\d+\.tmp")
"""Names that videos have here, or have until they are whole."""


class PredictionWriter(BasePredictionWriter):
    """One JSON object a line for every input, in the order of the inputs, failed ones included.

    Captions go to ``captions.jsonl`` (video, caption, error, seconds, seed), answers to ``answers.jsonl`` (with the
    question).  Made videos go to ``videos/00000.mp4`` and so on, with ``manifest.jsonl`` (prompt, video, caption,
    error, seconds, seed; of edits: source, prompt, strength, video, error, seconds, seed).
    Every file appears under its name when it is whole.  What an earlier call of this kind has left in the folder is
    removed when prediction starts, so that a list never stands beside videos of another.

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

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Remove what an earlier call has left.

        Raises:
            DataError: some of that is to be read now.
        """
        folder = self._folder(trainer)
        old = list(self._earlier(folder, NAMES.get(pl_module.predict_task, MANIFEST)))
        dataset = getattr(trainer.predict_dataloaders, "dataset", None)
        inputs = {os.path.realpath(path) for path in getattr(dataset, "paths", ())}
        if read := [path for path in old if os.path.realpath(path) in inputs]:
            raise DataError(f"{read[0]}: is to be read, but would be replaced; choose another trainer.default_root_dir")
        folder.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero:
            for path in old:
                path.unlink(missing_ok=True)
        trainer.strategy.barrier("earlier predictions removed")  # before anyone writes anew
        self._part(trainer, trainer.global_rank).write_text("")

    def _earlier(self, folder: Path, name: str) -> Iterator[Path]:
        """What is left of a call that wrote a list of that name, whole or not; the list first."""
        for path in (folder / name, _unfinished(folder / name), *sorted(folder.glob(".predictions-*.part"))):
            if path.is_file():
                yield path
        if name == MANIFEST:
            yield from sorted(path for path in (folder / "videos").glob("*") if VIDEO.fullmatch(path.name))

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
            whole = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            whole.write_bytes(encode_mp4(item.video, self.fps))
            os.replace(whole, path)
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
        target = self._folder(trainer) / NAMES.get(pl_module.predict_task, MANIFEST)
        whole = _unfinished(target)
        whole.write_text("".join(to_line(rows[i]) for i in sorted(rows)), encoding="utf-8")
        os.replace(whole, target)
        for part in parts:
            part.unlink()
        failed = sum(row["error"] is not None for row in rows.values())
        Console().print(f"wrote {target}: {len(rows)} rows, {failed} of them errors", soft_wrap=True, highlight=False)


def _unfinished(target: Path) -> Path:
    """Where a list lies until it is whole."""
    return target.with_suffix(".tmp")
