"""``lightning predict``: what it makes of a batch of inputs, and how the results are written."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, LightningDataModule, Trainer

from univigu.data.loader import of_all_ranks
from univigu.data.rows import to_line
from univigu.data.sample import DataError
from univigu.data.shards import replacing
from univigu.data.video import encode_mp4, to_frames
from univigu.models.tokens import replace_words, tokenize

if TYPE_CHECKING:
    from univigu.pipeline import TaskRunner
    from univigu.training.module import UniViGU

RESULTS = {
    "caption": ["caption"],
    "qa": ["answer"],
    "edit": ["video"],
    "generate": ["video", "caption"],
    "joint": ["video", "caption"],
}
"""Fields of a result's row by task, beside those of the input."""
LISTS = {"caption": "captions.jsonl", "qa": "answers.jsonl"}
"""Names of the lists of tasks that give only text; of others it is ``manifest.jsonl``."""
VIDEO = re.compile(r"\d{5,}\.mp4|\.\d{5,}\.mp4\.\w+\.tmp")
Row = dict[str, Any]
"""What the list of results holds of an input: its fields, see ``RESULTS``, error, seconds and seed."""


def predict_batch(module: UniViGU, batch: dict[str, Any], data: LightningDataModule) -> list[tuple[int, Row]]:
    """Predict a batch of the prediction loader; an input that could not be read gives a row with its error.

    Args:
        module: its ``predict_task`` is the task.
        batch: of ``univigu.data.inputs.PredictionInputs``.
        data: has the ``prompt_length`` and, for made videos, their ``num_frames``, ``height`` and ``width``.

    Returns:
        The inputs' positions in their list and rows, in which a made video is uint8 [F, C, H, W] until it is written.
    """
    start, rows = time.perf_counter(), list[Row]()
    for index, row, error in zip(batch["index"], batch["row"], batch["error"], strict=True):
        result = {"error": error, "seconds": 0.0, "seed": module.seed + index}
        rows.append(row | dict.fromkeys(RESULTS[module.predict_task]) | result)
    valid = [(row, clip) for row, clip in zip(rows, batch["clip"], strict=True) if row["error"] is None]
    texts, groups = Counter(clip for _, clip in valid), dict[Any, list[tuple[Row, int]]]()
    for row, clip in valid:  # each strength has its own start time, each video of a batch as many questions
        groups.setdefault((row.get("strength"), texts[clip]), []).append((row, clip))
    for group in groups.values():
        members, shown = zip(*group, strict=True)
        _predict(module, members, data, batch["video"][list(dict.fromkeys(shown))] if "video" in batch else None)
    for row, _ in valid:
        row["seconds"] = round((time.perf_counter() - start) / len(valid), 4)
    return list(zip(batch["index"], rows, strict=True))


def _predict(module: UniViGU, rows: Sequence[Row], data: Any, video: torch.Tensor | None) -> None:
    """Run the task on inputs that need the same options; as many of them a video."""
    tasks, task = module.tasks, module.predict_task
    latents = None if video is None else module.latents_of({"video": video})
    if task == "edit" and latents is not None:
        _fill_in_prompts(tasks, rows, latents, data.prompt_length)
        usable = [i for i, row in enumerate(rows) if row["error"] is None]
        rows, latents = [rows[i] for i in usable], latents[usable]
        if not rows:
            return
    prompts = None if task == "caption" else [row["question" if task == "qa" else "prompt"] for row in rows]
    inputs: dict[str, Any] = {"generator": tasks.generators(row["seed"] for row in rows)}
    if latents is None:
        inputs["shape"] = tasks.latents_shape(data.height, data.width, data.num_frames)
    else:
        inputs |= {"latents": latents, "strength": rows[0].get("strength", 1.0)}
    samples = tasks.sample("answer" if task == "qa" else task, prompts, data.prompt_length, **inputs)
    if samples.tokens is not None:
        for row, text in zip(rows, tasks.texts(samples), strict=True):
            row["answer" if task == "qa" else "caption"] = text
    if task not in ("caption", "qa"):
        for row, frames in zip(rows, to_frames(tasks.decode(samples.latents)).cpu(), strict=True):
            row["video"] = frames


def _fill_in_prompts(tasks: TaskRunner, rows: Sequence[Row], latents: torch.Tensor, length: int) -> None:
    """Replace words in the prompts of edits; a missing prompt is the model's own. A row that fails gets an error."""
    if own := [i for i, row in enumerate(rows) if row["prompt"] is None]:
        texts = tasks.describe(latents[own], length, tasks.generators(rows[i]["seed"] for i in own))
        for i, text in zip(own, texts, strict=True):
            rows[i]["prompt"] = text
    for row in rows:
        try:
            if row["replace"]:
                row["prompt"] = replace_words(row["prompt"], row["replace"])
            tokenize(tasks.components.tokenizer, [row["prompt"]], length)
        except ValueError as error:
            row["error"] = str(error)


class PredictionWriter(Callback):
    """One JSON object a line for every input, in the order of the inputs, failed ones included.

    In ``trainer.default_root_dir``: captions in ``captions.jsonl`` (video, caption, error, seconds, seed), answers in
    ``answers.jsonl`` (with the question), videos in ``videos/00000.mp4`` and so on, with ``manifest.jsonl`` (prompt,
    video, caption, error, seconds, seed; of edits also source, strength and replace).  Files are written atomically.
    Results of an earlier call of this kind are removed when prediction starts.

    Args:
        fps: frames a second of written videos.
    """

    failed = False
    """Whether no input could be used."""
    _list: Path
    _rows: dict[int, Row]

    def __init__(self, fps: int = 8) -> None:
        self.fps = fps

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Remove the results of an earlier call; raises DataError if some of them are inputs of this one."""
        folder = Path(trainer.default_root_dir)
        self._list, self._rows = folder / LISTS.get(pl_module.predict_task, "manifest.jsonl"), {}
        old = [self._list]
        if pl_module.predict_task not in LISTS:
            old += sorted(path for path in (folder / "videos").glob("*") if VIDEO.fullmatch(path.name))
        dataset = getattr(trainer.predict_dataloaders, "dataset", None)
        inputs = {os.path.realpath(path) for path in getattr(dataset, "videos", ()) if path}
        if read := [path for path in old if os.path.realpath(path) in inputs]:
            raise DataError(f"{read[0]}: is to be read, but would be replaced; choose another trainer.default_root_dir")
        if trainer.is_global_zero:
            for path in old:
                path.unlink(missing_ok=True)
        trainer.strategy.barrier("earlier predictions removed")

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        for index, row in outputs:
            if isinstance(row.get("video"), torch.Tensor):
                path = self._list.parent / "videos" / f"{index:05d}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    temporary.write_bytes(encode_mp4(row["video"], self.fps))
                row["video"] = str(path)
            self._rows[index] = row

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        found = of_all_ranks(self._rows)
        if trainer.is_global_zero:
            rows = {number: row for part in found for number, row in part.items()}
            self._list.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._list) as temporary:
                temporary.write_text("".join(to_line(rows[number]) for number in sorted(rows)), encoding="utf-8")
            failed = sum(row["error"] is not None for row in rows.values())
            self.failed = failed == len(rows)
            print(f"wrote {self._list}: {len(rows)} rows, {failed} of them errors")
