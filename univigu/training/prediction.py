"""What ``lightning predict`` makes of a batch of inputs, for whoever writes it down."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

PredictTask = Literal["caption", "generate", "joint", "edit", "qa"]
INPUTS: dict[str, str] = {
    "caption": "videos",
    "generate": "prompts",
    "joint": "prompts",
    "edit": "pairs",
    "qa": "pairs",
}
"""Which option of the data module a task takes its inputs from."""


@dataclass
class Prediction:
    """One predicted item: what it was made of, and the text, the video, or the error."""

    index: int
    """Position in the list of inputs."""
    source: str
    """Path of the video, or the prompt."""
    condition: str | None = None
    """What a video is to be, or what is asked about it."""
    strength: float | None = None
    """How far back towards noise an edit started."""
    text: str | None = None
    video: torch.Tensor | None = None
    """uint8 [F, C, H, W]."""
    error: str | None = None
    seconds: float = 0.0
    seed: int = 0


def predict_batch(module: Any, batch: dict[str, Any], data: Any) -> list[Prediction]:
    """Predict a batch of the prediction loader; items it could not read come through as errors.

    Args:
        module: the LightningModule; its ``predict_task`` says what is made.
        batch: of :class:`univigu.data.inputs.PredictionInputs`.
        data: the data module, for the size of videos and the prompts' slot.
    """
    start = time.perf_counter()
    sources = batch["path"] if "path" in batch else batch["prompt"]
    results = [
        Prediction(index, source, error=error, seed=module.seed + index)
        for index, source, error in zip(batch["index"], sources, batch["error"], strict=True)
    ]
    if "text" in batch:
        for result, text, strength in zip(results, batch["text"], batch["strength"], strict=True):
            result.condition, result.strength = text, strength
    good = [result for result in results if result.error is None]
    if good:
        module.foundation.to(module.device)
        if module.predict_task == "edit":
            _edit(module, good, batch["video"], data.prompt_length)
        elif module.predict_task in ("caption", "qa"):
            _read(module, good, batch["video"], data.prompt_length)
        else:
            _generate(module, good, data)
    for result in good:
        result.seconds = (time.perf_counter() - start) / len(good)
    return results


def _read(module: Any, good: list[Prediction], video: torch.Tensor, prompt_length: int) -> None:
    """Captions, or answers where there are questions."""
    questions = [result.condition for result in good] if module.predict_task == "qa" else None
    seeds = [result.seed for result in good]
    texts = module.caption(module.encode_frames(video), prompt_length, seeds, questions)
    for result, text in zip(good, texts, strict=True):
        result.text = text


def _generate(module: Any, good: list[Prediction], data: Any) -> None:
    """Videos from prompts, for ``joint`` with their texts."""
    shape = module.latents_shape(data.num_frames, data.height, data.width)
    prompts, seeds = [result.source for result in good], [result.seed for result in good]
    frames, texts = module.generate(prompts, data.prompt_length, shape, seeds, module.predict_task == "joint")
    for result, clip, text in zip(good, frames, texts or [None] * len(good), strict=True):
        result.video, result.text = clip.cpu(), text


def _edit(module: Any, good: list[Prediction], video: torch.Tensor, prompt_length: int) -> None:
    """Videos made anew; those of one strength go through the sampler together, as they start at the same time."""
    for strength in dict.fromkeys(result.strength for result in good):
        rows = [i for i, result in enumerate(good) if result.strength == strength]
        group = [good[i] for i in rows]
        prompts, seeds = [result.condition for result in group], [result.seed for result in group]
        frames = module.edit(module.encode_frames(video[rows]), strength, prompts, prompt_length, seeds)
        for result, clip in zip(group, frames, strict=True):
            result.video = clip.cpu()
