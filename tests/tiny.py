"""A tiny random pipeline in Wan's folder layout."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tools.make_foundation import make_vae
from univigu.models.foundation import Foundation
from univigu.models.options import ArchitectureOptions
from univigu.models.transformer import UniViGUTransformer3DModel

CHANNELS, TEXT_DIM, HEADS, HEAD_DIM = 4, 32, 2, 12


@torch.no_grad()
def shake(model: torch.nn.Module, amount: float = 0.1) -> None:
    """Move every weight, so that none sits at the 0 or 1 it starts at, where a missing factor would not show."""
    for parameter in model.parameters():
        parameter += amount * torch.randn_like(parameter)


def make_wan(seed: int = 0, **options: Any) -> WanTransformer3DModel:
    """A random Wan transformer of two layers."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 40,
        "num_layers": 2,
    }
    wan = WanTransformer3DModel(**(defaults | options))
    shake(wan)
    return wan.eval()


def make_unified(wan: WanTransformer3DModel, vocab_size: int = 11, **options: Any) -> UniViGUTransformer3DModel:
    """A unified model on it, all of whose weights are random and none of whose parts are copies of each other."""
    torch.manual_seed(1)
    model = UniViGUTransformer3DModel.from_wan(wan, vocab_size, ArchitectureOptions(**options))
    video = {name: value.clone() for name, value in wan.state_dict().items()}
    shake(model)
    model.load_state_dict(video, strict=False)
    return model.eval()


def make_wan22_vae() -> AutoencoderKLWan:
    """Wan2.2 TI2V-5B's VAE but for its widths: 48 channels, residual blocks, 16x16 spatial and 4x temporal."""
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=6,
        z_dim=48,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )


def make_pipeline(wan22: bool = False) -> WanPipeline:
    """All the components of WanPipeline, random; 8x8 spatial and 4x temporal compression as Wan's, or as Wan2.2 5B."""
    torch.manual_seed(0)
    tokenizer = Foundation().tokenizer
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            feed_forward_proj="gated-gelu",
        )
    )
    vae = make_wan22_vae() if wan22 else make_vae(CHANNELS, 8)
    channels = vae.config.z_dim
    vae.register_to_config(latents_mean=[0.1] * channels, latents_std=[1.5] * channels)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=make_wan(in_channels=channels, out_channels=channels),
        scheduler=scheduler,
        expand_timesteps=wan22,
    )
