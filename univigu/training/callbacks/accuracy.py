"""Learning curves in what matters: the properties that captions of held-out clips get right."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer

from univigu.data.sample import questions_of
from univigu.training.callbacks.media import HeldOutCallback, caption_samples
from univigu.training.callbacks.report import attribute_accuracy


class CaptionAccuracy(HeldOutCallback):
    """Logs the accuracy of held-out captions under three conditions, in clips of the embedded world.

    ``val/caption/*``                     read off the clean video, without a prompt
    ``val/caption_with_prompt/mean``      given the clip's own prompt too
    ``val/caption_with_other_prompt/mean``  given another clip's prompt: what copies the condition fails here

    Args:
        every_n_steps: how often, in optimizer steps; 0 switches it off.
        num_clips: how many held-out clips, the same ones every time.
        batch_size: clips captioned at once.
    """

    def __init__(self, every_n_steps: int = 200, num_clips: int = 64, batch_size: int = 32) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 0), ("num_clips", num_clips, 2), ("batch_size", batch_size, 1)
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")
        super().__init__(every_n_steps, num_clips)
        self.batch_size = batch_size

    def look(self, trainer: Trainer, pl_module: Any) -> None:
        results = self.measure(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(results, step=trainer.global_step)

    @torch.no_grad()
    def measure(self, trainer: Trainer, pl_module: Any) -> dict[str, float]:
        """Accuracies in [0, 1] by name; empty where no clip's scene is known, or no captions are learned."""
        if not pl_module.stage.writes_text:
            return {}
        samples, kind = self.samples(trainer), pl_module.stage.target
        if questions_of(samples):
            return {}
        latents, prompts = pl_module.latents_of(samples), samples["prompt"]
        results: dict[str, float] = {}
        for name, given in (
            ("caption", None),
            ("caption_with_prompt", prompts),
            ("caption_with_other_prompt", prompts[1:] + prompts[:1]),
        ):
            captions = caption_samples(pl_module, samples, latents, self.batch_size, given)
            accuracy = attribute_accuracy(captions, samples["scene"], kind)
            shown = accuracy if given is None else {key: accuracy[key] for key in ("mean",) if key in accuracy}
            results |= {f"val/{name}/{attribute}": value for attribute, value in shown.items()}
        return results
