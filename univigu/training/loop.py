"""A resumable training loop for the small networks beside the model: text encoder and VAE."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from univigu.data.progress import track
from univigu.data.shards import replacing

SAVE_EVERY = 250  # steps


def optimize(
    name: str, module: nn.Module, loss_of: Callable[[int], Tensor], steps: int, lr: float, state: Path | None = None
) -> None:
    """Train a module in place with AdamW; the rate rises over a tenth of the steps and falls as a cosine.

    ``loss_of`` draws the batch of a step, given its number, and returns the loss. The file ``state`` receives, every
    ``SAVE_EVERY`` steps and at the end, all that the next step depends on; if it is there, training continues from it.
    """
    warmup = max(1, steps // 10)
    optimizer = torch.optim.AdamW(module.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * i / steps)) + 1e-3
    )
    start, parts = 0, list[Any]((module, optimizer, schedule))
    if state is not None and state.exists():
        saved = torch.load(state, weights_only=True)
        for part, values in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(values)
        torch.set_rng_state(saved["rng"])
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
        start = saved["step"]
    for step in track(range(start, steps), f"training the {name}"):
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if state is not None and ((step + 1) % SAVE_EVERY == 0 or step + 1 == steps):
            saved = {"step": step + 1, "parts": [part.state_dict() for part in parts]}
            saved |= {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
            with replacing(state) as temporary:
                torch.save(saved, temporary)
