"""Draws the clips of the embedded world."""

from __future__ import annotations

import numpy as np
import torch

from univigu.shapes.scenes import BACKGROUNDS, CANVAS, COLORS, NUM_FRAMES, SHAPES, SIZES, Scene


def render(scene: Scene, height: int = CANVAS, width: int = CANVAS, num_frames: int = NUM_FRAMES) -> torch.Tensor:
    """The clip, uint8 [F, C, H, W], anti-aliased by 4x4 supersampling; its path is the same in any number of frames."""
    over = 4
    ys = (np.arange(height * over) + 0.5) * CANVAS / (height * over)
    xs = (np.arange(width * over) + 0.5) * CANVAS / (width * over)
    frames = np.full((num_frames, height, width, 3), BACKGROUNDS[scene.background], np.float32)
    for i in range(num_frames):
        time = i * (NUM_FRAMES - 1) / max(num_frames - 1, 1)
        for obj in scene.objects:
            cx, cy = obj.center(time)
            rows, columns = _covered(cy, obj.size, height), _covered(cx, obj.size, width)
            dx = xs[None, columns.start * over : columns.stop * over] - cx
            dy = ys[rows.start * over : rows.stop * over, None] - cy
            inside = shape_mask(obj.shape, dx, dy, SIZES[obj.size])
            cover = inside.reshape(dy.size // over, over, dx.size // over, over).mean((1, 3), dtype=np.float32)
            region = frames[i, rows, columns]
            region += cover[..., None] * (np.array(COLORS[obj.color], np.float32) - region)
    return torch.from_numpy(frames.round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def _covered(center: float, size: str, pixels: int) -> slice:
    """The range of rows (or columns) that an object may cover, in a frame of ``pixels`` rows (or columns)."""
    low, high = ((center + sign * SIZES[size]) * pixels / CANVAS for sign in (-1, 1))
    return slice(max(int(low), 0), min(int(high) + 1, pixels))


def shape_mask(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Whether points at offset (dx, dy) from the centre lie in the shape, whose bounding box has side 2*radius."""
    box = (np.abs(dx) <= radius) & (np.abs(dy) <= radius)
    if shape == "square":
        return box
    if shape == "circle":
        return dx**2 + dy**2 <= radius**2
    if shape == "ring":
        distance = dx**2 + dy**2
        return (distance <= radius**2) & (distance >= (0.55 * radius) ** 2)
    if shape == "cross":
        return box & ((np.abs(dx) <= radius / 3) | (np.abs(dy) <= radius / 3))
    if shape == "triangle":  # tip up
        return box & (np.abs(dx) <= (dy + radius) / 2)
    raise ValueError(f"shape={shape!r}: expected one of {SHAPES}")
