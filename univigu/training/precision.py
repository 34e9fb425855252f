"""``--trainer.precision bf16-true``: weights in bfloat16, but float32 where they are trained or where Wan keeps it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from lightning.pytorch.plugins import Precision
from torch import nn

from univigu.models.weights import load_model


class BFloat16Weights(Precision):
    """Converts nothing: the module loads its weights in the right dtypes.

    Lightning's own would cast all of them, and make every new tensor bfloat16, in which times are too coarse. The
    updates of training are too small for bfloat16 weights, too, so that trained ones are float32.
    """

    precision = "bf16-true"  # type: ignore[assignment]


def compute_in_bfloat16(model: nn.Module, device_type: str) -> None:
    """Let a model with weights in both dtypes compute in bfloat16, but times in float32 as Wan does."""
    model.forward = torch.autocast(device_type, torch.bfloat16, cache_enabled=False)(model.forward)  # type: ignore[method-assign]
    for name, module in model.named_modules():
        if name.endswith("time_embedder"):
            module.forward = torch.autocast(device_type, enabled=False)(module.forward)  # type: ignore[method-assign]


def load_generator(folder: Path, half: bool, device: torch.device) -> WanTransformer3DModel:
    """A foundation's frozen transformer, which takes float32 inputs also if its weights are bfloat16 (``half``)."""
    wan = load_model(WanTransformer3DModel, folder, torch_dtype=torch.bfloat16 if half else torch.float32).to(device)
    if half:
        compute_in_bfloat16(wan, device.type)
    return wan.eval().requires_grad_(False)
