"""Callbacks that use the model on held-out clips: pictures and texts, curves of what captions state, a final report."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from univigu.data.sample import questions_of
from univigu.data.video import to_frames
from univigu.pipeline import TaskRunner
from univigu.sampling.sampler import Task
from univigu.shapes.metrics import ShapesTextAccuracy
from univigu.training.module import UniViGU
from univigu.training.stages import ends_step
from univigu.viewer import enlarged

log = logging.getLogger(__name__)

SCALE, FPS = 2, 8
"""Enlargement of the logged videos, and their frames a second."""


class HeldOutCallback(Callback):
    """Calls ``evaluate`` every few optimizer steps (0: never), in evaluation mode, on the same clips every time.

    All processes call it, on the clips of rank 0, because a sharded model needs them all; rank 0 writes.
    """

    def __init__(self, every_n_steps: int, num_samples: int) -> None:
        if every_n_steps < 0 or num_samples < 1:
            raise ValueError(f"every_n_steps={every_n_steps}, num_samples={num_samples}: expected at least 0 and 1")
        self.every_n_steps, self.num_samples = every_n_steps, num_samples
        self._samples: dict[str, Any] | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if ends_step(trainer, batch_idx) and self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            pl_module.eval()
            with torch.no_grad():
                self.evaluate(trainer, pl_module)
            pl_module.train()

    def evaluate(self, trainer: Trainer, pl_module: UniViGU) -> None:
        """Measure or log once, without changing the training's random state."""
        raise NotImplementedError

    def samples(self, trainer: Trainer) -> dict[str, Any]:
        """The clips of rank 0, read once: the first of the validation split, of one size. May be empty."""
        if self._samples is None:
            rows: dict[str, Any] = {}
            data = getattr(trainer, "datamodule", None)
            for batch in data.val_dataloader() if data is not None and trainer.is_global_zero else ():
                if rows and batch.get("bucket", [0])[0] != rows.get("bucket", [0])[0]:
                    break
                for name, value in batch.items():
                    if name in rows:
                        value = torch.cat([rows[name], value]) if torch.is_tensor(value) else rows[name] + value
                    rows[name] = value
                if len(rows["key"]) >= self.num_samples:
                    break
            rows = {name: value[: self.num_samples] for name, value in rows.items()}
            self._samples = trainer.strategy.broadcast(rows)
        return self._samples


def caption_samples(
    tasks: TaskRunner, samples: dict[str, Any], latents: torch.Tensor, prompts: list[str] | None
) -> list[str]:
    """Captions of clean latents [B, C, T, H, W], 16 at a time, or answers; ``prompts``: a condition for each clip."""
    task: Task = "answer" if questions_of(samples) else "caption"
    captions, length = [], samples["prompt_ids"].shape[1]
    for numbers in torch.arange(len(latents)).split(16):
        part, generators = slice(numbers[0], numbers[-1] + 1), tasks.generators(numbers.tolist())
        given = None if prompts is None else prompts[part]
        captions += tasks.texts(tasks.sample(task, given, length, latents=latents[part], generator=generators))
    return captions


def attribute_accuracy(texts: list[str], samples: dict[str, Any], kind: str) -> dict[str, float]:
    """Accuracy by property of texts ("prompt" or "caption") about clips of the embedded world; empty for others."""
    metric = ShapesTextAccuracy(kind)
    metric.update(texts, samples.get("scene") or [None] * len(texts))
    return {name: float(value) for name, value in metric.compute().items()} if metric.samples else {}


class CaptionAccuracy(HeldOutCallback):
    """Logs the accuracy of held-out captions under three conditions, for clips of the embedded world.

    * ``val/caption/*``: from the clean video, without a prompt.
    * ``val/caption_with_prompt/mean``: also given the clip's own prompt.
    * ``val/caption_with_other_prompt/mean``: given another clip's prompt; a model that copies its condition fails here.
    """

    def __init__(self, every_n_steps: int = 200, num_clips: int = 64) -> None:
        if num_clips < 2:
            raise ValueError(f"num_clips={num_clips}: expected at least 2")
        super().__init__(every_n_steps, num_clips)

    def evaluate(self, trainer: Trainer, pl_module: UniViGU) -> None:
        samples = self.samples(trainer) if pl_module.stage.writes_text else {}
        if not samples or questions_of(samples):
            return
        latents, prompts = pl_module.latents_of(samples), samples["prompt"]
        conditions = {"": None, "_with_prompt": prompts, "_with_other_prompt": prompts[1:] + prompts[:1]}
        results: dict[str, float] = {}
        for suffix, given in conditions.items():
            captions = caption_samples(pl_module.tasks, samples, latents, given)
            accuracy = attribute_accuracy(captions, samples, pl_module.stage.target)
            names = accuracy if given is None else accuracy.keys() & {"mean"}
            results |= {f"val/caption{suffix}/{name}": accuracy[name] for name in names}
        for logger in trainer.loggers:
            logger.log_metrics(results, step=trainer.global_step)


class FinalReport(HeldOutCallback):
    """Prints captions of held-out clips beside the true texts, and where to find curves and checkpoint.

    Args:
        num_samples: clips to caption for the accuracy.
        num_shown: captions to print.
    """

    def __init__(self, num_samples: int = 32, num_shown: int = 3) -> None:
        super().__init__(0, num_samples)
        self.num_shown = num_shown

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """After the last checkpoint, with the weights to use (see ``WeightEMA``)."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        console, curves = Console(quiet=not trainer.is_global_zero), trainer.log_dir  # which all processes ask for
        tensorboard = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        if pl_module.stage.writes_text:
            try:
                self._captions(trainer, pl_module, console)
            except Exception:  # the training is complete
                log.exception("the held-out clips could not be captioned; the training itself is complete")
        if curves:
            where = f"tensorboard --logdir {trainer.default_root_dir}" if tensorboard else curves
            console.print(f"curves, captions, videos: {where}", soft_wrap=True, highlight=False)
        if path := getattr(trainer.checkpoint_callback, "last_model_path", ""):
            console.print(f"checkpoint: {path}", soft_wrap=True, highlight=False)

    def _captions(self, trainer: Trainer, pl_module: UniViGU, console: Console) -> None:
        if not (samples := self.samples(trainer)):
            return
        pl_module.eval()
        questions, target = questions_of(samples), pl_module.stage.target
        captions = caption_samples(pl_module.tasks, samples, pl_module.latents_of(samples), questions)
        title = "held-out clips and questions" if questions else "held-out clips, captioned from the video alone"
        table = Table("clip", "truth", "model", title=title, show_lines=True)
        for row in list(zip(samples["key"], samples[target], captions, strict=True))[: self.num_shown]:
            table.add_row(*map(escape, row))
        console.print(table)
        if accuracy := {} if questions else attribute_accuracy(captions, samples, target):
            numbers = ", ".join(f"{name} {value:.0%}" for name, value in accuracy.items())
            console.print(f"accuracy over {len(captions)} held-out clips: {numbers}", highlight=False)


class MediaLogger(HeldOutCallback):
    """Logs held-out clips (once), their captions beside the true texts, and generated videos to TensorBoard or
    Weights & Biases.

    Args:
        every_n_steps: how often, in optimizer steps; 0 switches it off.
        num_samples: number of held-out clips, the same ones every time.
    """

    def __init__(self, every_n_steps: int = 400, num_samples: int = 4) -> None:
        super().__init__(every_n_steps, num_samples)
        self._clips_logged = False

    def evaluate(self, trainer: Trainer, pl_module: UniViGU) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, (TensorBoardLogger, WandbLogger))]
        samples, step = self.samples(trainer) if loggers else {}, trainer.global_step
        if not samples:
            return
        if not trainer.is_global_zero:
            loggers = []
        latents, tasks = pl_module.latents_of(samples), pl_module.tasks
        if pl_module.stage.writes_text:
            captions = caption_samples(tasks, samples, latents, questions_of(samples))
            rows = zip(samples["key"], samples[pl_module.stage.target], captions, strict=True)
            log_table(loggers, "held_out/captions", ["clip", "truth", "model"], list(rows), step)
            if not self._clips_logged:
                log_video(loggers, "held_out/clips", to_frames(tasks.decode(latents)), step)
            self._clips_logged = True
        length, generator = samples["prompt_ids"].shape[1], tasks.generators(range(len(latents)))
        made = tasks.sample("generate", samples["prompt"], length, shape=tuple(latents.shape[1:]), generator=generator)
        log_video(loggers, "held_out/generated", to_frames(tasks.decode(made.latents)), step)
        log_table(loggers, "held_out/prompts", ["prompt"], [(prompt,) for prompt in samples["prompt"]], step)


def log_table(loggers: Sequence[Any], tag: str, columns: list[str], rows: Sequence[Sequence[str]], step: int) -> None:
    """Log texts as a table."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(tag, columns, [list(row) for row in rows], step=step)
        else:
            logger.experiment.add_text(tag, markdown_table(columns, rows), step)


def markdown_table(columns: list[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, whatever the texts contain: each cell on one line, with bars escaped as in HTML."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[" ".join(text.split()).replace("|", "&#124;") for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def log_video(loggers: Sequence[Any], tag: str, frames: torch.Tensor, step: int) -> None:
    """Log clips uint8 [B, F, C, H, W] side by side as one GIF, which needs no moviepy."""
    first, *others = enlarged(torch.cat(list(frames.cpu()), dim=-1), SCALE)  # [F, C, H, B * W]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=round(1000 / FPS), loop=0)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_video(tag, [io.BytesIO(buffer.getvalue())], step=step, format=["gif"])
            continue
        from tensorboard.compat.proto.summary_pb2 import Summary

        size = {"width": first.width, "height": first.height, "colorspace": 3}
        image = Summary.Image(**size, encoded_image_string=buffer.getvalue())
        logger.experiment.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
