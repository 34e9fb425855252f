"""Clips to latents and prompts to embeddings: the one implementation for training, pipeline and precomputation.

A clip's latents and a prompt's embeddings depend on neither the batch nor the entry point, bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from transformers import UMT5EncoderModel

from univigu.models.foundation import normalize_latents
from univigu.models.weights import compute_device

MAX_CLIPS, MAX_PIXELS = 4, 2**18
"""Limits of a group of clips that is encoded in one call: clips, and pixels of all their frames."""


def group_size(num_frames: int, height: int, width: int) -> int:
    """Number of clips that are encoded in one call: one at real sizes, up to four small ones."""
    return max(1, min(MAX_CLIPS, MAX_PIXELS // (num_frames * height * width)))


def encode_clips(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Video [B, C, F, H, W] in [-1, 1] -> normalised float32 latents [B, C, T, H, W], the mode and not a sample.

    Their rounding depends on the number of clips in a call, on the number of threads of a CPU, and on the memory format
    of the VAE's kernels (``univigu.models.foundation.set_conv_layout``). So every call has one thread and the same
    number of clips; the last group is filled up with copies.
    """
    size, device = group_size(*video.shape[2:]), compute_device(vae)
    filled = torch.cat([video, video[-1:].expand(-len(video) % size, *video.shape[1:])])
    threads = torch.get_num_threads()
    if size > 1 and device.type == "cpu":
        torch.set_num_threads(1)
    try:
        groups = (clips.to(device, vae.dtype) for clips in filled.split(size))
        latents = torch.cat([vae.encode(clips).latent_dist.mode() for clips in groups])
    finally:
        torch.set_num_threads(threads)
    return normalize_latents(latents[: len(video)].float(), vae)


def encode_prompts(
    text_encoder: UMT5EncoderModel, ids: torch.Tensor, pad_token_id: int, zero_padding: bool = True
) -> torch.Tensor:
    """Token ids [B, S] -> prompt embeddings [B, S, text_dim], each prompt encoded by itself.

    Past a prompt's end they are zero, or with ``zero_padding=False`` what the encoder gives for padding.
    """
    rows = []
    for row in ids:
        mask = (row != pad_token_id)[None]
        shown = int(mask.sum()) if zero_padding else len(row)
        embeds = text_encoder(row[None, :shown], mask[:, :shown].long()).last_hidden_state
        rows.append(F.pad(embeds, (0, 0, 0, len(row) - shown)))
    return torch.cat(rows)
