"""Learning curves of the properties that captions of held-out clips state correctly."""

from __future__ import annotations

import torch
from lightning import Trainer

from univigu.data.sample import questions_of
from univigu.training.callbacks.held_out import HeldOutCallback, attribute_accuracy, caption_samples
from univigu.training.module import UniViGU


class CaptionAccuracy(HeldOutCallback):
    """Logs the accuracy of held-out captions under three conditions, for clips of the embedded world.

    ``val/caption/*``                       from the clean video, without a prompt
    ``val/caption_with_prompt/mean``        also given the clip's own prompt
    ``val/caption_with_other_prompt/mean``  given another clip's prompt: a model that copies its condition fails here

    Args:
        every_n_steps: how often, in optimizer steps; 0 switches it off.
        num_clips: number of held-out clips, the same ones every time.
        batch_size: clips captioned at once.
    """

    def __init__(self, every_n_steps: int = 200, num_clips: int = 64, batch_size: int = 32) -> None:
        for name, value, least in (("num_clips", num_clips, 2), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")
        super().__init__(every_n_steps, num_clips)
        self.batch_size = batch_size

    def evaluate(self, trainer: Trainer, pl_module: UniViGU) -> None:
        results = self.measure(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(results, step=trainer.global_step)

    @torch.no_grad()
    def measure(self, trainer: Trainer, pl_module: UniViGU) -> dict[str, float]:
        """Accuracies in [0, 1] by name; empty if no scene is known or the stage trains no captions."""
        samples = self.samples(trainer) if pl_module.stage.writes_text else {}
        if not samples or questions_of(samples):
            return {}
        latents, prompts = pl_module.latents_of(samples), samples["prompt"]
        results: dict[str, float] = {}
        for name, given in (
            ("caption", None),
            ("caption_with_prompt", prompts),
            ("caption_with_other_prompt", prompts[1:] + prompts[:1]),
        ):
            captions = caption_samples(pl_module, samples, latents, self.batch_size, given)
            accuracy = attribute_accuracy(captions, samples, pl_module.stage.target)
            names = accuracy if given is None else accuracy.keys() & {"mean"}
            results |= {f"val/{name}/{attribute}": accuracy[attribute] for attribute in names}
        return results
