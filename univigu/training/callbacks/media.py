"""What people would rather look at: held-out captions as text, generated videos as moving pictures."""

from __future__ import annotations

import io
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from univigu.data.sample import questions_of
from univigu.training.parallel import is_sharded


class HeldOutCallback(Callback):
    """Looks at the same held-out clips every so many optimizer steps, in evaluation mode, on rank 0.

    The processes of a sharded model do so together, on rank 0's clips.

    Args:
        every_n_steps: how often; 0 switches it off.
        num_samples: how many clips.
    """

    def __init__(self, every_n_steps: int, num_samples: int) -> None:
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self._samples: dict[str, Any] | None = None
        self._looked = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # A step stays the same for as many batches as gradients are accumulated over.
        due = self.every_n_steps and step != self._looked and step % self.every_n_steps == 0
        if not (due and takes_part(trainer, pl_module)):
            return
        self._looked = step
        pl_module.eval()
        try:
            with torch.no_grad():
                self.look(trainer, pl_module)
        finally:
            pl_module.train()

    def look(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure or log once, without moving the training's random state."""
        raise NotImplementedError

    def samples(self, trainer: Trainer) -> dict[str, Any]:
        """The clips, read once."""
        if self._samples is None:
            self._samples = shared_samples(trainer, self.num_samples)
        return self._samples


class MediaLogger(HeldOutCallback):
    """Logs held-out clips, their captions beside the truth, and videos generated from their prompts, to TensorBoard.

    The clips themselves are logged once, out of their latents: what the model sees of them.

    Args:
        every_n_steps: how often, in optimizer steps; 0 switches it off.
        num_samples: how many held-out clips, the same ones every time.
        scale: enlargement of the logged videos.
        fps: frames a second of the logged videos.
    """

    def __init__(self, every_n_steps: int = 200, num_samples: int = 4, scale: int = 2, fps: int = 8) -> None:
        if every_n_steps < 0 or num_samples < 1:
            raise ValueError(f"every_n_steps={every_n_steps}, num_samples={num_samples}: expected at least 0 and 1")
        super().__init__(every_n_steps, num_samples)
        self.scale = scale
        self.fps = fps
        self._shown = False  # the clips themselves stay the same

    def look(self, trainer: Trainer, pl_module: Any) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not loggers:
            return
        writers = [logger.experiment for logger in loggers] if trainer.is_global_zero else []
        samples, step = self.samples(trainer), trainer.global_step
        length, seeds = samples["prompt_ids"].shape[1], list(range(len(samples["key"])))
        latents = pl_module.latents_of(samples)
        if pl_module.stage.writes_text:
            captions = pl_module.caption(latents, length, seeds, questions_of(samples))
            if not self._shown:
                clips = pl_module.decode(latents)
                for writer in writers:
                    add_video(writer, "held_out/clips", clips, step, self.fps, self.scale)
                self._shown = True
            table = caption_table(samples["key"], samples[pl_module.stage.target], captions)
            for writer in writers:
                writer.add_text("held_out/captions", table, step)
        frames, _ = pl_module.generate(samples["prompt"], length, tuple(latents.shape[1:]), seeds)
        for writer in writers:
            add_video(writer, "held_out/generated", frames, step, self.fps, self.scale)
            writer.add_text("held_out/prompts", "  \n".join(samples["prompt"]), step)


def takes_part(trainer: Trainer, pl_module: Any) -> bool:
    """Whether this process has to run the model when rank 0 does."""
    return trainer.is_global_zero or is_sharded(pl_module.transformer)


def shared_samples(trainer: Trainer, count: int) -> dict[str, Any]:
    """:func:`held_out_samples` of rank 0, for all that take part."""
    if not is_sharded(trainer.lightning_module.transformer):  # type: ignore[arg-type]
        return held_out_samples(trainer, count)
    return trainer.strategy.broadcast(held_out_samples(trainer, count) if trainer.is_global_zero else {})


def held_out_samples(trainer: Trainer, count: int) -> dict[str, Any]:
    """The first ``count`` samples of the validation split (of its first bucket), as one batch."""
    rows: dict[str, Any] = {}
    for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
        if rows and batch["bucket"][0] != rows["bucket"][0]:
            break
        for name, value in batch.items():
            if name in rows:
                rows[name] = torch.cat([rows[name], value]) if isinstance(value, torch.Tensor) else rows[name] + value
            else:
                rows[name] = value
        if len(rows["key"]) >= count:
            break
    return {name: value[:count] for name, value in rows.items()}


def caption_samples(
    pl_module: Any, samples: dict[str, Any], latents: torch.Tensor, batch_size: int, prompts: list[str] | None = None
) -> list[str]:
    """Captions of samples with clean latents [B, C, T, H, W], ``batch_size`` at once; see ``UniViGU.caption``."""
    seeds, length = list(range(len(samples["key"]))), samples["prompt_ids"].shape[1]
    captions = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        given = None if prompts is None else prompts[part]
        captions += pl_module.caption(latents[part], length, seeds[part], given)
    return captions


def caption_table(keys: list[str], truth: list[str], captions: list[str]) -> str:
    """A Markdown table of clips, what is so, and what the model reads; a row each, whatever the texts hold."""
    rows = ["| clip | truth | model |", "|---|---|---|"]
    rows += [f"| {' | '.join(map(table_cell, row))} |" for row in zip(keys, truth, captions, strict=True)]
    return "\n".join(rows)


def table_cell(text: str) -> str:
    """A text as a cell of a Markdown table: on one line, and with no bar that would end the cell.

    The bar is written as in HTML, not with a backslash: who splits rows at bars need not know of it.
    """
    return " ".join(text.split()).replace("|", "&#124;")


def add_video(writer: Any, tag: str, frames: torch.Tensor, step: int, fps: int, scale: int) -> None:
    """Log clips uint8 [B, F, C, H, W] side by side as one GIF (SummaryWriter.add_video would need moviepy)."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    strip = torch.cat(list(frames.cpu()), dim=-1).permute(0, 2, 3, 1)  # [F, H, B * W, C]
    height, width = strip.shape[1] * scale, strip.shape[2] * scale
    images = [Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.NEAREST) for frame in strip]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
