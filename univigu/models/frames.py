"""Videos in the forms that diffusers' users have, as one form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

CHANNELS = (1, 3, 4)  # gray, RGB, RGBA


def to_frames(video: Any) -> torch.Tensor | list[list[Image.Image]]:
    """A video or a batch of them as RGB: float32 [B, F, C, H, W] in [0, 1], or a list of PIL images for each video.

    Takes lists of PIL images; numpy arrays and torch tensors [F, H, W, C] or [F, C, H, W] of 1, 3 or 4 channels, uint8
    or floats in [0, 1]; batches and lists of them. Where both layouts fit, an array has its channels last and a tensor
    first. Opacity is ignored.

    Raises:
        ValueError: another type, shape or range, which is named.
    """
    video = _stacked(video)
    if isinstance(video, list):
        return [[frame.convert("RGB") for frame in clip] for clip in video]
    frames = torch.as_tensor(np.ascontiguousarray(video) if isinstance(video, np.ndarray) else video)
    if frames.ndim == 4:
        frames = frames[None]
    first, last = (frames.ndim == 5 and frames.shape[axis] in CHANNELS for axis in (2, 4))
    if not first and not last:
        shape = list(video.shape)
        raise ValueError(f"video: shape {shape}, expected [F, H, W, C] or [F, C, H, W] with 1, 3 or 4 channels")
    if last and (not first or isinstance(video, np.ndarray)):
        frames = rearrange(frames, "b f h w c -> b f c h w")
    if frames.dtype == torch.uint8:
        frames = frames.float() / 255
    elif not frames.is_floating_point():
        raise ValueError(f"video: dtype {video.dtype}, expected uint8 or floats in [0, 1]")
    low, high = frames.aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also for NaN
        raise ValueError(f"video: floats from {low:g} to {high:g}, expected [0, 1], or uint8")
    frames = frames.float().clamp(0, 1)[:, :, :3]
    return frames if frames.shape[2] == 3 else frames.expand(-1, -1, 3, -1, -1)


def crop(pixels: torch.Tensor, temporal: int, down: int, right: int) -> torch.Tensor:
    """Videos [B, C, F, H, W] cropped to 1 + n * ``temporal`` frames and multiples of ``down`` and ``right`` pixels."""
    frames, height, width = pixels.shape[2:]
    if height < down or width < right:
        raise ValueError(f"video: {height} x {width} pixels, expected at least {down} x {right}")
    return pixels[:, :, : (frames - 1) // temporal * temporal + 1, : height // down * down, : width // right * right]


def _stacked(video: Any) -> Any:
    """Lists of arrays as one array; lists of PIL images as a list for each video."""
    if isinstance(video, np.ndarray | torch.Tensor):
        return video
    if isinstance(video, Image.Image):
        return [[video]]
    if not isinstance(video, list | tuple) or not video:
        raise ValueError(f"video: {type(video).__name__}, expected a list of PIL images, an array or a tensor")
    if all(isinstance(frame, Image.Image) for frame in video):
        return [list(video)]
    parts = [_stacked(part) for part in video]
    kinds = {type(part) for part in parts}
    if kinds == {list}:
        return [clip for part in parts for clip in part]
    if len(kinds) > 1 or len({part.shape for part in parts}) > 1:
        raise ValueError("video: a list of frames or videos of several types or shapes")
    return np.stack(parts) if kinds == {np.ndarray} else torch.stack(parts)
