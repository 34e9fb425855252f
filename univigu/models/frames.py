"""Videos in the forms that diffusers' users have, as pixels for the VAE."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

CHANNELS = (1, 3, 4)  # gray, RGB, RGBA


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
    first, last = (frames.ndim == 5 and frames.shape[axis] in CHANNELS for axis in (2, 4))
    if not first and not last:
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
