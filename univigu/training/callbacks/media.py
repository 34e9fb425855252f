"""Logs captions of held-out clips as text and generated videos as animated pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from univigu.data.sample import questions_of
from univigu.data.video import to_frames
from univigu.training.callbacks.held_out import HeldOutCallback, caption_samples
from univigu.training.module import UniViGU
from univigu.viewer import enlarged

SCALE, FPS = 2, 8
"""Enlargement of the logged videos, and their frames a second."""


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


MediaLoggers = Sequence[TensorBoardLogger | WandbLogger]


def log_table(loggers: MediaLoggers, tag: str, columns: list[str], rows: Sequence[Sequence[str]], step: int) -> None:
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


def log_video(loggers: MediaLoggers, tag: str, frames: torch.Tensor, step: int) -> None:
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
