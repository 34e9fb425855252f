"""Held-out clips for callbacks: a base class, the clips, and their captions."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from univigu.shapes.metrics import ShapesTextAccuracy
from univigu.shapes.scenes import Scene
from univigu.training.module import UniViGU
from univigu.training.parallel import is_sharded


class HeldOutCallback(Callback):
    """Calls :meth:`evaluate` every few optimizer steps, in evaluation mode, on rank 0.

    The processes of a sharded model all call it, on the clips of rank 0.

    Args:
        every_n_steps: how often; 0 switches it off.
        num_samples: number of clips; they are the same ones every time.
    """

    def __init__(self, every_n_steps: int, num_samples: int) -> None:
        if every_n_steps < 0 or num_samples < 1:
            raise ValueError(f"every_n_steps={every_n_steps}, num_samples={num_samples}: expected at least 0 and 1")
        self.every_n_steps, self.num_samples = every_n_steps, num_samples
        self._samples: dict[str, Any] | None = None
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, UniViGU)
        step = trainer.global_step
        # With gradient accumulation a step stays the same for several batches.
        due = self.every_n_steps and step != self._last_step and step % self.every_n_steps == 0
        if not (due and runs_model(trainer, pl_module)):
            return
        self._last_step = step
        pl_module.eval()
        try:
            with torch.no_grad():
                self.evaluate(trainer, pl_module)
        finally:
            pl_module.train()

    def evaluate(self, trainer: Trainer, pl_module: UniViGU) -> None:
        """Measure or log once, without changing the training's random state."""
        raise NotImplementedError

    def samples(self, trainer: Trainer) -> dict[str, Any]:
        """The clips, read once."""
        if self._samples is None:
            self._samples = shared_samples(trainer, self.num_samples)
        return self._samples


def runs_model(trainer: Trainer, pl_module: UniViGU) -> bool:
    """Whether this process must run the model when rank 0 does."""
    return trainer.is_global_zero or _is_sharded(pl_module)


def shared_samples(trainer: Trainer, count: int) -> dict[str, Any]:
    """:func:`held_out_samples` of rank 0, for all processes that run the model."""
    if not _is_sharded(trainer.lightning_module):
        return held_out_samples(trainer, count)
    return trainer.strategy.broadcast(held_out_samples(trainer, count) if trainer.is_global_zero else {})


def _is_sharded(module: LightningModule) -> bool:
    return isinstance(module, UniViGU) and module.transformer is not None and is_sharded(module.transformer)


def held_out_samples(trainer: Trainer, count: int) -> dict[str, Any]:
    """The first ``count`` samples of the validation split (of its first size) as one batch; may be empty."""
    rows: dict[str, Any] = {}
    data = getattr(trainer, "datamodule", None)
    for batch in data.val_dataloader() if data is not None else ():
        if rows and batch.get("bucket", [0])[0] != rows.get("bucket", [0])[0]:
            break
        for name, value in batch.items():
            if name in rows:
                value = torch.cat([rows[name], value]) if isinstance(value, torch.Tensor) else rows[name] + value
            rows[name] = value
        if len(rows["key"]) >= count:
            break
    return {name: value[:count] for name, value in rows.items()}


def caption_samples(
    pl_module: UniViGU, samples: dict[str, Any], latents: torch.Tensor, batch_size: int, prompts: list[str] | None
) -> list[str]:
    """Captions of samples with clean latents [B, C, T, H, W], ``batch_size`` at a time; see ``UniViGU.caption``."""
    seeds, length = list(range(len(samples["key"]))), samples["prompt_ids"].shape[1]
    captions = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        captions += pl_module.caption(latents[part], length, seeds[part], None if prompts is None else prompts[part])
    return captions


def attribute_accuracy(texts: list[str], samples: dict[str, Any], kind: str) -> dict[str, float]:
    """Accuracy by property of texts ("prompt" or "caption") about clips of the embedded world; empty for others."""
    scenes = samples.get("scene") or [None] * len(texts)
    known = [(text, Scene.from_dict(scene)) for text, scene in zip(texts, scenes, strict=True) if scene is not None]
    if not known:
        return {}
    metric = ShapesTextAccuracy(kind)
    metric.update([text for text, _ in known], [scene for _, scene in known])
    return {name: float(value) for name, value in metric.compute().items()}
