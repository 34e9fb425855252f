"""What a finished training prints: held-out captions beside the truth, and where to look further."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning import Callback, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from univigu.data.sample import questions_of
from univigu.training.callbacks.media import caption_samples, shared_samples, takes_part

log = logging.getLogger(__name__)


class FinalReport(Callback):
    """Captions ``num_samples`` held-out clips when training ends and prints them beside the truth.

    Args:
        num_samples: clips to caption.
        num_shown: clips to print in full; the accuracy counts all of them.
    """

    def __init__(self, num_samples: int = 32, num_shown: int = 3) -> None:
        self.num_samples = num_samples
        self.num_shown = num_shown

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not takes_part(trainer, pl_module) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        console = Console(quiet=not trainer.is_global_zero)
        if pl_module.stage.writes_text:
            try:
                self._captions(trainer, pl_module, console)
            except Exception:  # what other callbacks have to do when training ends is worth more than a report
                log.exception("the held-out clips could not be captioned; the training itself is whole")
        if trainer.log_dir:
            console.print(f"curves, captions, videos: tensorboard --logdir {trainer.default_root_dir}", soft_wrap=True)
        best = getattr(trainer.checkpoint_callback, "last_model_path", "")
        if best:
            console.print(f"checkpoint: {best}", soft_wrap=True, highlight=False)

    def _captions(self, trainer: Trainer, pl_module: Any, console: Console) -> None:
        samples = shared_samples(trainer, self.num_samples)
        latents = pl_module.latents_of(samples)
        pl_module.eval()
        count = len(samples["key"])
        questions = questions_of(samples)
        captions = caption_samples(pl_module, samples, latents, 16, questions)
        truth = samples[pl_module.stage.target]
        title = "held-out clips and questions" if questions else "held-out clips, captioned from the video alone"
        table = Table("clip", "truth", "model", title=title, show_lines=True)
        for row in range(min(self.num_shown, count)):
            table.add_row(samples["key"][row], escape(truth[row]), escape(captions[row]))
        console.print(table)
        accuracy = {} if questions else attribute_accuracy(captions, samples["scene"], pl_module.stage.target)
        if accuracy:
            numbers = ", ".join(f"{name} {value:.0%}" for name, value in accuracy.items())
            console.print(f"accuracy over {count} held-out clips: {numbers}", highlight=False)


def attribute_accuracy(texts: list[str], scenes: list[dict[str, Any] | None], kind: str) -> dict[str, float]:
    """Accuracy by property of texts ("prompt" or "caption") about clips of the embedded world.

    Clips whose scene is not known do not count; empty if there is no other.
    """
    from univigu.shapes.metrics import ShapesTextAccuracy
    from univigu.shapes.scenes import Scene

    known = [(text, Scene.from_dict(scene)) for text, scene in zip(texts, scenes, strict=True) if scene is not None]
    if not known:
        return {}
    metric = ShapesTextAccuracy(kind)
    metric.update([text for text, _ in known], [scene for _, scene in known])
    return {name: float(value) for name, value in metric.compute().items()}
