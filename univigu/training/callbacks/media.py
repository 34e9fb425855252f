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


class MediaLogger(HeldOutCallback):
    """Logs held-out clips (once), their captions beside the true texts, and generated videos to TensorBoard.

    Args:
        every_n_steps: how often, in optimizer steps; 0 switches it off.
        num_samples: number of held-out clips, the same ones every time.
        scale: enlargement of the logged videos.
        fps: frames a second of the logged videos.
    """

    def __init__(self, every_n_steps: int = 400, num_samples: int = 4, scale: int = 2, fps: int = 8) -> None:
        super().__init__(every_n_steps, num_samples)
        self.scale, self.fps = scale, fps
        self._clips_logged = False

    def evaluate(self, trainer: Trainer, pl_module: UniViGU) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        samples, step = self.samples(trainer) if loggers else {}, trainer.global_step
        if not samples:
            return
        writers = [logger.experiment for logger in loggers] if trainer.is_global_zero else []
        latents, tasks = pl_module.latents_of(samples), pl_module.tasks
        captions = clips = None
        if pl_module.stage.writes_text:
            captions = caption_samples(pl_module, samples, latents, questions_of(samples))
            clips = None if self._clips_logged else pl_module.decode(latents)
            self._clips_logged = True
        length, generators = samples["prompt_ids"].shape[1], pl_module.generators(list(range(len(latents))))
        made = tasks.sample("generate", samples["prompt"], length, shape=tuple(latents.shape[1:]), generator=generators)
        assert made.latents is not None
        generated = to_frames(tasks.decode(made.latents))
        for writer in writers:
            if captions is not None:
                table = caption_table(samples["key"], samples[pl_module.stage.target], captions)
                writer.add_text("held_out/captions", table, step)
            if clips is not None:
                add_video(writer, "held_out/clips", clips, step, self.fps, self.scale)
            add_video(writer, "held_out/generated", generated, step, self.fps, self.scale)
            writer.add_text("held_out/prompts", "  \n".join(samples["prompt"]), step)


def caption_table(keys: list[str], truth: list[str], captions: list[str]) -> str:
    """A Markdown table of clips, true texts and captions, one row each, whatever the texts contain."""
    rows = ["| clip | truth | model |", "|---|---|---|"]
    for row in zip(keys, truth, captions, strict=True):  # each cell on one line, with bars escaped as in HTML
        rows.append("| " + " | ".join(" ".join(text.split()).replace("|", "&#124;") for text in row) + " |")
    return "\n".join(rows)


def add_video(writer: Any, tag: str, frames: torch.Tensor, step: int, fps: int, scale: int) -> None:
    """Log clips uint8 [B, F, C, H, W] side by side as one GIF (SummaryWriter.add_video would need moviepy)."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    first, *others = enlarged(torch.cat(list(frames.cpu()), dim=-1), scale)  # [F, C, H, B * W]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    width, height = first.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
