"""Prints captions of held-out clips when training ends."""

from __future__ import annotations

import logging

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from univigu.data.sample import questions_of
from univigu.training.callbacks.held_out import attribute_accuracy, caption_samples, runs_model, shared_samples
from univigu.training.module import UniViGU

log = logging.getLogger(__name__)


class FinalReport(Callback):
    """Prints captions of held-out clips beside the true texts, and where to find curves and checkpoint.

    Args:
        num_samples: clips to caption.
        num_shown: captions to print; the accuracy is that of all clips.
    """

    def __init__(self, num_samples: int = 32, num_shown: int = 3) -> None:
        self.num_samples, self.num_shown = num_samples, num_shown

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, UniViGU)
        if not runs_model(trainer, pl_module) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        console = Console(quiet=not trainer.is_global_zero)
        if pl_module.stage.writes_text:
            try:
                self._captions(trainer, pl_module, console)
            except Exception:  # the on_train_end hooks of other callbacks must still run
                log.exception("the held-out clips could not be captioned; the training itself is complete")
        if trainer.log_dir:
            console.print(f"curves, captions, videos: tensorboard --logdir {trainer.default_root_dir}", soft_wrap=True)
        if path := getattr(trainer.checkpoint_callback, "last_model_path", ""):
            console.print(f"checkpoint: {path}", soft_wrap=True, highlight=False)

    def _captions(self, trainer: Trainer, pl_module: UniViGU, console: Console) -> None:
        samples = shared_samples(trainer, self.num_samples)
        pl_module.eval()
        questions, target = questions_of(samples), pl_module.stage.target
        captions = caption_samples(pl_module, samples, pl_module.latents_of(samples), 16, questions)
        title = "held-out clips and questions" if questions else "held-out clips, captioned from the video alone"
        table = Table("clip", "truth", "model", title=title, show_lines=True)
        for row in list(zip(samples["key"], samples[target], captions, strict=True))[: self.num_shown]:
            table.add_row(*map(escape, row))
        console.print(table)
        if accuracy := {} if questions else attribute_accuracy(captions, samples, target):
            numbers = ", ".join(f"{name} {value:.0%}" for name, value in accuracy.items())
            console.print(f"accuracy over {len(captions)} held-out clips: {numbers}", highlight=False)
