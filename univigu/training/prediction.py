"""What ``lightning predict`` makes of a batch of inputs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule

from univigu.data.video import to_frames
from univigu.models.tokens import replace_words, tokenize

if TYPE_CHECKING:
    from univigu.pipeline import TaskRunner
    from univigu.training.module import UniViGU

INPUTS = {
    "caption": ("video",),
    "qa": ("video", "question"),
    "edit": ("source", "prompt", "strength", "replace"),
    "generate": ("prompt",),
    "joint": ("prompt",),
}
"""Fields of a result's row that describe its input: the video or prompt, the text about the video, options of edits."""
OUTPUTS = {"caption": ("caption",), "qa": ("answer",), "edit": ("video",)}
"""Fields with the results; of other tasks they are the video and the caption."""


@dataclass
class Prediction:
    """One predicted item."""

    index: int
    """Position in the list of inputs."""
    row: dict[str, Any]
    """What the list of results holds: input, results, error, seconds and seed. The writer adds the video's path."""
    video: torch.Tensor | None = None
    """uint8 [F, C, H, W]."""


def predict_batch(module: UniViGU, batch: dict[str, Any], data: LightningDataModule) -> list[Prediction]:
    """Predict a batch of the prediction loader; items that could not be read are returned with their error.

    Args:
        module: its ``predict_task`` is the task.
        batch: of ``univigu.data.inputs.PredictionInputs``.
        data: has the ``prompt_length`` and, for made videos, their ``num_frames``, ``height`` and ``width``.
    """
    start, task, count = time.perf_counter(), module.predict_task, len(batch["index"])
    columns = [batch["path"] if "path" in batch else batch["prompt"]]
    columns += [batch.get(name, [None] * count) for name in ("text", "strength", "replace")]
    results, outputs = [], dict.fromkeys(OUTPUTS.get(task, ("video", "caption")))
    for index, error, *values in zip(batch["index"], batch["error"], *columns, strict=True):
        given = dict(zip(INPUTS[task], values, strict=False))
        row = {**given, **outputs, "error": error, "seconds": 0.0, "seed": module.seed + index}
        results.append(Prediction(index, row))
    clips = batch.get("clip", range(count))
    valid = [(result, clip) for result, clip in zip(results, clips, strict=True) if result.row["error"] is None]
    texts = Counter(clip for _, clip in valid)
    kinds = [(result.row.get("strength"), texts[clip]) for result, clip in valid]
    for kind in dict.fromkeys(kinds):  # each strength has its own start time, each video of a batch as many questions
        items, shown = zip(*(pair for pair, value in zip(valid, kinds, strict=True) if value == kind), strict=True)
        _predict(module, items, data, batch["video"][list(dict.fromkeys(shown))] if "video" in batch else None)
    for result, _ in valid:
        result.row["seconds"] = round((time.perf_counter() - start) / len(valid), 4)
    return results


def _predict(module: UniViGU, items: Sequence[Prediction], data: Any, video: torch.Tensor | None) -> None:
    """Run the task on items that need the same options; as many of them a video."""
    tasks, task = module.tasks, module.predict_task
    latents = None if video is None else module.latents_of({"video": video})
    if task == "edit" and latents is not None:
        fill_in_prompts(tasks, [item.row for item in items], latents, data.prompt_length)
        usable = [i for i, item in enumerate(items) if item.row["error"] is None]
        items, latents = [items[i] for i in usable], latents[usable]
        if not items:
            return
    rows = [item.row for item in items]
    prompts = None if task == "caption" else [row["question" if task == "qa" else "prompt"] for row in rows]
    inputs: dict[str, Any] = {"generator": tasks.generators(row["seed"] for row in rows)}
    if latents is None:
        inputs["shape"] = tasks.latents_shape(data.height, data.width, data.num_frames)
    else:
        inputs |= {"latents": latents, "strength": rows[0].get("strength")}
    samples = tasks.sample("caption" if task == "qa" else task, prompts, data.prompt_length, **inputs)
    if samples.tokens is not None:
        for row, text in zip(rows, tasks.texts(samples), strict=True):
            row["answer" if task == "qa" else "caption"] = text
    if task not in ("caption", "qa"):
        for item, frames in zip(items, to_frames(tasks.decode(samples.latents)).cpu(), strict=True):
            item.video = frames


def fill_in_prompts(tasks: TaskRunner, rows: list[dict[str, Any]], latents: torch.Tensor, length: int) -> None:
    """Replace words in the prompts of edits; a missing prompt is the model's own. A row that fails gets an error.

    Args:
        rows: with "prompt", "replace" and "seed".
        latents: of the rows' videos.
        length: slot of the prompts in tokens.
    """
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
