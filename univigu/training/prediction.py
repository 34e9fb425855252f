"""What ``lightning predict`` makes of a batch of inputs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule

from univigu.data.video import to_frames

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
    if not valid:
        return results
    if module.predict_task == "edit":
        for strength in dict.fromkeys(result.strength for result in valid):  # one strength at a time: one start time
            rows = [i for i, result in enumerate(valid) if result.strength == strength]
            _predict(module, [valid[i] for i in rows], data, batch["video"][rows])
    else:
        _predict(module, valid, data, batch.get("video"))
    for result in valid:
        result.seconds = (time.perf_counter() - start) / len(valid)
    return results


def _predict(module: UniViGU, items: list[Prediction], data: Any, video: torch.Tensor | None) -> None:
    """Run the task on items that need the same options."""
    tasks, task, length = module.tasks, module.predict_task, data.prompt_length
    generators = module.generators([item.seed for item in items])
    latents = None if video is None else module.encode_frames(video)
    conditions = [item.condition if task in ("edit", "qa") else item.source for item in items]
    if task in ("caption", "qa"):
        assert latents is not None
        samples = tasks.caption(latents, conditions if task == "qa" else None, length, generators)  # type: ignore[arg-type]
    elif task == "edit":
        assert latents is not None and items[0].strength is not None
        samples = tasks.edit(latents, items[0].strength, conditions, length, generators)  # type: ignore[arg-type]
    else:
        shape = tasks.latents_shape(data.height, data.width, data.num_frames)
        make = tasks.joint if task == "joint" else tasks.generate
        samples = make(conditions, length, shape, generators)  # type: ignore[arg-type]
    frames = None if task in ("caption", "qa") else to_frames(tasks.decode(samples.latents)).cpu()  # type: ignore[arg-type]
    texts = tasks.texts(samples)
    for i, item in enumerate(items):
        item.text = None if texts is None else texts[i]
        item.video = None if frames is None else frames[i]
