"""Logs captions of held-out clips as text and generated videos as animated pictures."""

from __future__ import annotations

import io
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from univigu.data.sample import questions_of
from univigu.data.video import to_frames
from univigu.training.callbacks.held_out import HeldOutCallback, caption_samples
from univigu.training.module import UniViGU
from univigu.viewer import enlarged

SCALE, FPS = 2, 8
"""Enlargement of the logged videos, and their frames a second."""


class MediaLogger(HeldOutCallback):
    """Logs held-out clips (once), their captions beside the true texts, and generated videos to TensorBoard.

    Args:
        every_n_steps: how often, in optimizer steps; 0 switches it off.
        num_samples: number of held-out clips, the same ones every time.
    """

    def __init__(self, every_n_steps: int = 400, num_samples: int = 4) -> None:
        super().__init__(every_n_steps, num_samples)
        self._clips_logged = False

    def evaluate(self, trainer: Trainer, pl_module: UniViGU) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        samples, step = self.samples(trainer) if loggers else {}, trainer.global_step
        if not samples:
            return
        writers = [logger.experiment for logger in loggers] if trainer.is_global_zero else []
        latents, tasks = pl_module.latents_of(samples), pl_module.tasks
        if pl_module.stage.writes_text:
            captions = caption_samples(tasks, samples, latents, questions_of(samples))
            table = caption_table(samples["key"], samples[pl_module.stage.target], captions)
            for writer in writers:
                writer.add_text("held_out/captions", table, step)
                if not self._clips_logged:
                    add_video(writer, "held_out/clips", to_frames(tasks.decode(latents)), step)
            self._clips_logged = True
        length, generator = samples["prompt_ids"].shape[1], tasks.generators(range(len(latents)))
        made = tasks.sample("generate", samples["prompt"], length, shape=tuple(latents.shape[1:]), generator=generator)
        for writer in writers:
            add_video(writer, "held_out/generated", to_frames(tasks.decode(made.latents)), step)
            writer.add_text("held_out/prompts", "  \n".join(samples["prompt"]), step)


def caption_table(keys: list[str], truth: list[str], captions: list[str]) -> str:
    """A Markdown table of clips, true texts and captions, one row each, whatever the texts contain."""
    rows = ["| clip | truth | model |", "|---|---|---|"]
    for row in zip(keys, truth, captions, strict=True):  # each cell on one line, with bars escaped as in HTML
        rows.append("| " + " | ".join(" ".join(text.split()).replace("|", "&#124;") for text in row) + " |")
    return "\n".join(rows)


def add_video(writer: Any, tag: str, frames: torch.Tensor, step: int) -> None:
    """Log clips uint8 [B, F, C, H, W] side by side as one GIF (SummaryWriter.add_video would need moviepy)."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    first, *others = enlarged(torch.cat(list(frames.cpu()), dim=-1), SCALE)  # [F, C, H, B * W]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=round(1000 / FPS), loop=0)
    width, height = first.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
