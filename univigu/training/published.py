"""From a configuration to what it will train, without the weights; Wan2.1's sizes, as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from univigu.data.buckets import Bucket, latents_shape
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import known_options
from univigu.training.plan import Workload

_COMMON: dict[str, Any] = {
    "patch_size": (1, 2, 2), "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256,
}  # fmt: skip
WAN21: dict[str, dict[str, Any]] = {
    "Wan2.1-T2V-1.3B": _COMMON | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan2.1-T2V-14B": _COMMON | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
"""Options of the transformers of https://huggingface.co/Wan-AI, by the beginning of their folders' names."""
UMT5_VOCAB_SIZE = 256384
LATENT_CHANNELS, TEMPORAL, SPATIAL = 16, 4, 8  # of Wan2.1's VAE


def workloads_of(args: list[str]) -> list[Workload]:
    """What ``lightning fit`` with these arguments would train, a workload for every stage.

    Raises:
        FileNotFoundError: the foundation is not there, and its name is none of Wan2.1's.
    """
    from univigu.training.lightning_cli import parse_fit

    cli = parse_fit(args)
    model, data = cli.model, cli.data
    foundation = Path(model.foundation)
    transformer, vocab_size, (channels, temporal, spatial) = _sizes(foundation)
    transformer |= dict(model.architecture) | {"vocab_size": vocab_size}
    latents = (channels, *latents_shape(Bucket(data.height, data.width, data.num_frames), temporal, spatial))
    sharded = "Sharded" in str(cli.strategy)
    return [
        Workload(
            known_options(UniViGUTransformer3DModel, transformer),
            latents,
            data.prompt_length,
            stage,
            data.batch_size,
            model.trains,
            model.lora,
            model.flow,
            model.optimizer,
            getattr(torch, model.parallel.compute_dtype) if sharded else torch.float32,
            averaged=any("EMA" in name for name in cli.callbacks),
        )
        for stage in cli.stages
    ]


def _sizes(foundation: Path) -> tuple[dict[str, Any], int, tuple[int, int, int]]:
    """The transformer's options, the vocabulary and the VAE's (channels, temporal, spatial)."""
    if (foundation / "transformer" / "config.json").is_file():
        transformer = json.loads((foundation / "transformer" / "config.json").read_text())
        encoder = json.loads((foundation / "text_encoder" / "config.json").read_text())
        vae = json.loads((foundation / "vae" / "config.json").read_text())
        scales = (vae["z_dim"], vae.get("scale_factor_temporal", TEMPORAL), vae.get("scale_factor_spatial", SPATIAL))
        return transformer, int(encoder["vocab_size"]), scales
    for name, options in WAN21.items():
        if foundation.name.startswith(name):
            return dict(options), UMT5_VOCAB_SIZE, (LATENT_CHANNELS, TEMPORAL, SPATIAL)
    raise FileNotFoundError(f"foundation={str(foundation)!r}: no such folder, nor one of {', '.join(WAN21)}")
