"""What ``lightning predict`` makes of a batch of inputs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule

if TYPE_CHECKING:
    from univigu.training.module import UniViGU


@dataclass
class Prediction:
    """One predicted item: its input, and the text, the video, or the error."""

    index: int
    """Position in the list of inputs."""
    source: str
    """Path of the video, or the prompt."""
    condition: str | None = None
    """Prompt of an edit, or a question."""
    strength: float | None = None
    """Noise level at which an edit started."""
    text: str | None = None
    video: torch.Tensor | None = None
    """uint8 [F, C, H, W]."""
    error: str | None = None
    seconds: float = 0.0
    seed: int = 0


def predict_batch(module: UniViGU, batch: dict[str, Any], data: LightningDataModule) -> list[Prediction]:
    """Predict a batch of the prediction loader; items that could not be read are returned with their error.

    Args:
        module: its ``predict_task`` is the task.
        batch: of :class:`univigu.data.inputs.PredictionInputs`.
        data: has the ``prompt_length`` and, for made videos, their ``num_frames``, ``height`` and ``width``.
    """
    start = time.perf_counter()
    sources = batch["path"] if "path" in batch else batch["prompt"]
    nothing = [None] * len(sources)
    columns = batch["index"], sources, batch.get("text", nothing), batch.get("strength", nothing), batch["error"]
    results = [
        Prediction(index, source, condition, strength, error=error, seed=module.seed + index)
        for index, source, condition, strength, error in zip(*columns, strict=True)
    ]
    valid = [result for result in results if result.error is None]
    for strength in dict.fromkeys(result.strength for result in valid):  # each strength has its own start time
        rows = [i for i, result in enumerate(valid) if result.strength == strength]
        _predict(module, [valid[i] for i in rows], data, batch["video"][rows] if "video" in batch else None)
    for result in valid:
        result.seconds = (time.perf_counter() - start) / len(valid)
    return results


def _predict(module: UniViGU, items: list[Prediction], data: Any, video: torch.Tensor | None) -> None:
    """Run the task on items that need the same options."""
    tasks, task = module.tasks, module.predict_task
    prompts = None if task == "caption" else [i.source if i.condition is None else i.condition for i in items]
    inputs: dict[str, Any] = {"strength": items[0].strength, "generator": module.generators([i.seed for i in items])}
    if video is None:
        inputs["shape"] = tasks.latents_shape(data.height, data.width, data.num_frames)
    else:
        inputs["latents"] = module.encode_frames(video)
    samples = tasks.sample("caption" if task == "qa" else task, prompts, data.prompt_length, **inputs)
    frames = None if task in ("caption", "qa") else module.decode(samples.latents).cpu()
    texts = tasks.texts(samples)
    for i, item in enumerate(items):
        item.text = None if texts is None else texts[i]
        item.video = None if frames is None else frames[i]
