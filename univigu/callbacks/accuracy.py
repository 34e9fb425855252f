"""Learning curves in what matters: the properties that captions of held-out clips get right."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from univigu.callbacks.media import held_out_samples
from univigu.callbacks.report import attribute_accuracy


class CaptionAccuracy(Callback):
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
        self.every_n_steps = every_n_steps
        self.num_clips = num_clips
        self.batch_size = batch_size
        self._samples: dict[str, Any] | None = None

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not (self.every_n_steps and step and step % self.every_n_steps == 0):
            return
        pl_module.eval()
        try:
            results = self.measure(trainer, pl_module)
        finally:
            pl_module.train()
        for logger in trainer.loggers:
            logger.log_metrics(results, step=step)

    @torch.no_grad()
    def measure(self, trainer: Trainer, pl_module: Any) -> dict[str, float]:
        """Accuracies in [0, 1] by name; empty where no clip's scene is known or no text is learned."""
        tasks = pl_module.stage.tasks
        if tasks.joint + tasks.understand <= 0:
            return {}
        if self._samples is None:
            self._samples = held_out_samples(trainer, self.num_clips)
        samples, kind = self._samples, pl_module.stage.target
        prompts = samples["prompt"]
        results: dict[str, float] = {}
        for name, given in (
            ("caption", None),
            ("caption_with_prompt", prompts),
            ("caption_with_other_prompt", prompts[1:] + prompts[:1]),
        ):
            accuracy = attribute_accuracy(self._captions(pl_module, samples, given), samples["scene"], kind)
            shown = accuracy if given is None else {key: accuracy[key] for key in ("mean",) if key in accuracy}
            results |= {f"val/{name}/{attribute}": value for attribute, value in shown.items()}
        return results

    def _captions(self, pl_module: Any, samples: dict[str, Any], prompts: list[str] | None) -> list[str]:
        latents, length = pl_module.latents_of(samples), samples["prompt_ids"].shape[1]
        seeds, captions = list(range(len(samples["key"]))), []
        for start in range(0, len(seeds), self.batch_size):
            part = slice(start, start + self.batch_size)
            given = None if prompts is None else prompts[part]
            captions += pl_module.caption(latents[part], length, seeds[part], given)
        return captions
