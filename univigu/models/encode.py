"""Videos to latents and back, and prompts to embeddings: the one implementation for training, pipeline and encoding.

A clip's latents and a prompt's embeddings depend on neither the batch nor the entry point, bit for bit. A model may
know them under other ``Conventions`` than WanPipeline's, which its configuration records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from einops import rearrange
from PIL import Image
from transformers import UMT5EncoderModel

from univigu.models.weights import compute_device

NullCondition = Literal["encoded", "zeros"]
PromptPadding = Literal["zeros", "encoded"]

MAX_CLIPS, MAX_PIXELS = 4, 2**18
"""Limits of a group of clips that is encoded in one call: clips, and pixels of all their frames."""


def to_pixels(video: Any, height: int | None = None, width: int | None = None) -> torch.Tensor:
    """A video or a batch of them as RGB, float32 [B, 3, F, H, W] in [-1, 1], scaled to a size if one is given.

    Takes PIL images, a list a video; numpy arrays and torch tensors [F, H, W, C] or [F, C, H, W] of 1, 3 or 4 channels,
    uint8 or floats in [0, 1]; batches and lists of them. Where both layouts fit, an array has its channels last and a
    tensor first. Opacity is ignored. A ValueError names another type, shape or range.
    """
    stacked = _stacked([video] if isinstance(video, Image.Image) else video)
    frames = torch.as_tensor(np.ascontiguousarray(stacked) if isinstance(stacked, np.ndarray) else stacked)
    if frames.ndim == 4:
        frames = frames[None]
    first, last = (frames.ndim == 5 and frames.shape[axis] in (1, 3, 4) for axis in (2, 4))  # gray, RGB, RGBA
    if not (first or last) or not frames.numel():
        shape = list(stacked.shape)
        raise ValueError(f"video: shape {shape}, expected [F, H, W, C] or [F, C, H, W] with 1, 3 or 4 channels")
    if last and (not first or isinstance(stacked, np.ndarray)):
        frames = rearrange(frames, "b f h w c -> b f c h w")
    if frames.dtype == torch.uint8:
        frames = frames.float() / 255
    elif not frames.is_floating_point():
        raise ValueError(f"video: dtype {stacked.dtype}, expected uint8 or floats in [0, 1]")
    low, high = frames.aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also for NaN
        raise ValueError(f"video: floats from {low:g} to {high:g}, expected [0, 1], or uint8")
    size = height or frames.shape[3], width or frames.shape[4]
    images = frames.float().clamp(0, 1)[:, :, :3].flatten(0, 1)
    if size != frames.shape[3:]:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    pixels = rearrange(images, "(b f) c h w -> b c f h w", b=len(frames)) * 2 - 1
    return pixels.expand(-1, 3, -1, -1, -1)


def crop(pixels: torch.Tensor, temporal: int, down: int, right: int) -> torch.Tensor:
    """Videos [B, C, F, H, W] cropped to 1 + n * ``temporal`` frames and multiples of ``down`` and ``right`` pixels."""
    frames, height, width = pixels.shape[2:]
    if height < down or width < right:
        raise ValueError(f"video: {height} x {width} pixels, expected at least {down} x {right}")
    return pixels[:, :, : (frames - 1) // temporal * temporal + 1, : height // down * down, : width // right * right]


def _stacked(video: Any) -> Any:
    """Lists of images, arrays or tensors as one array or tensor."""
    if isinstance(video, Image.Image):
        return np.asarray(video.convert("RGB"))
    if isinstance(video, np.ndarray | torch.Tensor):
        return video
    if not isinstance(video, list | tuple) or not video:
        raise ValueError(f"video: {type(video).__name__}, expected a list of PIL images, an array or a tensor")
    parts = [_stacked(part) for part in video]
    if len({(type(part), part.shape) for part in parts}) > 1:
        raise ValueError("video: a list of frames or videos of several types or shapes")
    return np.stack(parts) if isinstance(parts[0], np.ndarray) else torch.stack(parts)


def normalize_latents(latents: torch.Tensor, vae: AutoencoderKLWan, inverse: bool = False) -> torch.Tensor:
    """VAE latents [B, C, T, H, W] to zero mean and unit deviation a channel, or back, exactly as in WanPipeline."""
    values = vae.config.latents_mean, vae.config.latents_std
    mean, std = (torch.tensor(value).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype) for value in values)
    return latents / (1.0 / std) + mean if inverse else (latents - mean) / std


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
    for row in ids.to(compute_device(text_encoder)):
        mask = (row != pad_token_id)[None]
        shown = int(mask.sum()) if zero_padding else len(row)
        embeds = text_encoder(row[None, :shown], mask[:, :shown].long()).last_hidden_state
        rows.append(F.pad(embeds, (0, 0, 0, len(row) - shown)))
    return torch.cat(rows)


@dataclass(frozen=True)
class Conventions:
    """The defaults are WanPipeline's; models made elsewhere may have been trained with others."""

    latents_normalized: bool = True
    """Whether latents have zero mean and unit deviation a channel; False takes the VAE's own."""
    null_condition: NullCondition = "encoded"
    """The null condition: the encoded empty prompt, or zeros."""
    prompt_padding: PromptPadding = "zeros"
    """Prompt embeddings past the prompt's end: zeros, or what the text encoder gives for padding."""

    def __post_init__(self) -> None:
        for name in ("null_condition", "prompt_padding"):
            if getattr(self, name) not in ("encoded", "zeros"):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected 'encoded' or 'zeros'")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Those of a model's configuration; missing entries are the defaults."""
        return cls(**{name: config[name] for name in CONVENTIONS if name in config})

    def null(self, embeds: torch.Tensor) -> torch.Tensor:
        """The null condition, given the encoded empty prompt [..., S, text_dim]."""
        return torch.zeros_like(embeds) if self.null_condition == "zeros" else embeds

    def encode_prompts(self, text_encoder: UMT5EncoderModel, ids: torch.Tensor, pad_token_id: int) -> torch.Tensor:
        """Token ids [B, S] -> prompt embeddings [B, S, text_dim], padded as the model knows them."""
        return encode_prompts(text_encoder, ids, pad_token_id, self.prompt_padding == "zeros")

    def from_normalized(self, latents: torch.Tensor, vae: AutoencoderKLWan) -> torch.Tensor:
        """Normalised latents, as in shards, for the transformer."""
        return latents if self.latents_normalized else normalize_latents(latents, vae, inverse=True)

    def decode(self, vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
        """The transformer's latents [B, C, T, H, W] -> video [B, C, F, H, W], roughly in [-1, 1]."""
        latents = latents.to(compute_device(vae), vae.dtype)
        return vae.decode(normalize_latents(latents, vae, inverse=True) if self.latents_normalized else latents).sample


CONVENTIONS = tuple(field.name for field in fields(Conventions))
"""Names of the entries in a model's configuration."""
OFFICIAL = Conventions(latents_normalized=False, null_condition="zeros", prompt_padding="encoded")
"""The official preview's, as far as is known."""
