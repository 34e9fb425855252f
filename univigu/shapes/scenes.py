"""The embedded world: short clips of moving shapes whose every property is known.

A :class:`Scene` is the single source of truth.  From it come the frames
(:func:`render`), the brief prompt (:func:`prompt_of`) and the detailed caption
(:func:`caption_of`), so that both directions of the unified model can be
checked exactly (``univigu.shapes.metrics``).

One fifth of all (colour, shape, motion) triples is held out of training:
:func:`is_held_out` is a Latin design, so that every *pair* of properties is
seen in training and only the combination is new.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

SIZES = {"small": 11, "large": 15}  # half the side of the bounding box, pixels at 64x64
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (60, 95, 245),
    "yellow": (240, 220, 40),
    "purple": (160, 50, 200),
    "cyan": (40, 210, 220),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
SPEEDS = {"slowly": 2.0, "quickly": 4.0}  # pixels a frame at 64x64: one and two cells of the grid in 4 frames
BACKGROUNDS = {
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "white": (240, 240, 240),
    "brown": (110, 70, 35),
}
RELATIONS = ("left of", "above")

CANVAS = 64  # pixels; all lengths above are given on this canvas
# Objects start on a grid of the latents' stride, so that a shape looks the same to a VAE wherever it is: the centres
# of small objects lie in the middle of a cell, those of large ones on a corner (so that two lanes hold either).
GRID = 8
NUM_FRAMES = 9  # 4k+1, as Wan's VAE wants
FPS = 8

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Object:
    """One thing in the scene; ``x, y`` is its centre in the first frame, in canvas pixels."""

    size: str
    color: str
    shape: str
    motion: str
    speed: str
    """One of :data:`SPEEDS`, or "" for an object that stays still."""
    x: float
    y: float

    def center(self, frame: int) -> tuple[float, float]:
        """Centre (x, y) in canvas pixels at the given frame, counted from 0."""
        dx, dy = MOTIONS[self.motion]
        step = SPEEDS.get(self.speed, 0.0) * frame
        return self.x + dx * step, self.y + dy * step


@dataclass(frozen=True)
class Scene:
    """Everything there is to know about a clip."""

    objects: tuple[Object, ...]
    """One or two objects, the left or upper one first."""
    background: str
    relation: str
    """How the first object lies to the second ("left of", "above"); "" for one object."""

    def to_dict(self) -> dict[str, Any]:
        """A json-ready description, the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        """Rebuild a scene from :meth:`to_dict`; raises KeyError or TypeError on a damaged one."""
        objects = tuple(Object(**obj) for obj in data["objects"])
        return cls(objects=objects, background=data["background"], relation=data["relation"])


# ------------------------------------------------------------------ sampling


def is_held_out(obj: Object) -> bool:
    """Whether the (colour, shape, motion) triple of an object is kept out of training."""
    index = list(COLORS).index(obj.color) + SHAPES.index(obj.shape) + list(MOTIONS).index(obj.motion)
    return index % len(SHAPES) == 0


def sample_scene(seed: int, split: Split = "train") -> Scene:
    """Draw the scene that belongs to a seed.

    Args:
        seed: any non-negative integer; the same seed gives the same scene.
        split: "train" scenes hold no held-out triple; "val" and "test" scenes hold at least one,
            and the two come from different streams.

    Raises:
        ValueError: for an unknown split.
    """
    streams = {"train": 0, "val": 1, "test": 2}
    if split not in streams:
        raise ValueError(f"split={split!r}: expected one of {list(streams)}")
    rng = np.random.default_rng([seed, streams[split]])
    while True:
        scene = _draw_scene(rng)
        held_out = any(is_held_out(obj) for obj in scene.objects)
        if held_out == (split != "train"):
            return scene


def _draw_scene(rng: np.random.Generator) -> Scene:
    background = _pick(rng, BACKGROUNDS)
    if rng.random() < 0.5:
        return Scene((_draw_object(rng, MOTIONS, (0, 0, CANVAS, CANVAS)),), background, "")
    # Two objects keep to lanes across their motion, so that they never meet and the relation holds throughout.
    relation = _pick(rng, RELATIONS)
    half = CANVAS // 2
    if relation == "left of":
        motions, lanes = ("up", "down", "still"), ((0, 0, half, CANVAS), (half, 0, CANVAS, CANVAS))
    else:
        motions, lanes = ("left", "right", "still"), ((0, 0, CANVAS, half), (0, half, CANVAS, CANVAS))
    first, second = (_draw_object(rng, motions, lane) for lane in lanes)
    # Colours tell the objects apart; and one of them moves, because the axis of motion tells the two relations apart.
    while second.color == first.color or first.motion == second.motion == "still":
        second = _draw_object(rng, motions, lanes[1])
    return Scene((first, second), background, relation)


def _draw_object(rng: np.random.Generator, motions: Any, lane: tuple[int, int, int, int]) -> Object:
    size, color, shape = _pick(rng, SIZES), _pick(rng, COLORS), _pick(rng, SHAPES)
    motion = _pick(rng, motions)
    speed = "" if motion == "still" else _pick(rng, SPEEDS)
    radius = SIZES[size] + 1
    left, top, right, bottom = lane
    while True:  # the whole path inside the lane
        x = _grid_point(rng, left + radius, right - radius, size)
        y = _grid_point(rng, top + radius, bottom - radius, size)
        obj = Object(size, color, shape, motion, speed, x, y)
        end = obj.center(NUM_FRAMES - 1)
        if left + radius <= end[0] <= right - radius and top + radius <= end[1] <= bottom - radius:
            return obj


def _grid_point(rng: np.random.Generator, low: float, high: float, size: str) -> float:
    """One of the grid's coordinates for objects of a size, from ``low`` to ``high``; see :data:`GRID`."""
    first = GRID // 2 if size == "small" else 0
    return float(rng.choice([v for v in range(first, CANVAS, GRID) if low <= v <= high]))


def _pick(rng: np.random.Generator, options: Any) -> str:
    return list(options)[int(rng.integers(len(options)))]


# ----------------------------------------------------------------- rendering


def render(scene: Scene, height: int = CANVAS, width: int = CANVAS, num_frames: int = NUM_FRAMES) -> torch.Tensor:
    """Draw the clip, anti-aliased by 4x4 supersampling.

    Returns:
        uint8 frames [F, C, H, W]; a longer or shorter clip shows the same path in more or fewer frames.
    """
    over = 4
    ys = (np.arange(height * over) + 0.5) * CANVAS / (height * over)
    xs = (np.arange(width * over) + 0.5) * CANVAS / (width * over)
    frames = np.empty((num_frames, height, width, 3), np.float32)
    frames[:] = BACKGROUNDS[scene.background]
    for i in range(num_frames):
        position = i * (NUM_FRAMES - 1) / max(num_frames - 1, 1)
        for obj in scene.objects:
            cx, cy = obj.center(position)  # type: ignore[arg-type]
            rows, columns = _covered(cy, obj.size, height), _covered(cx, obj.size, width)
            dx = xs[None, columns.start * over : columns.stop * over] - cx
            dy = ys[rows.start * over : rows.stop * over, None] - cy
            inside = shape_mask(obj.shape, dx, dy, SIZES[obj.size])
            cover = inside.reshape(dy.size // over, over, dx.size // over, over).mean((1, 3), dtype=np.float32)
            region = frames[i, rows, columns]
            region += cover[..., None] * (np.array(COLORS[obj.color], np.float32) - region)
    return torch.from_numpy(frames.round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def _covered(center: float, size: str, pixels: int) -> slice:
    """The rows or columns, of as many as there are, that an object of a size may cover."""
    low, high = ((center + sign * SIZES[size]) * pixels / CANVAS for sign in (-1, 1))
    return slice(max(int(low), 0), min(int(high) + 1, pixels))


def shape_mask(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Whether points at offset (dx, dy) from the centre lie in the shape; its box has side 2*radius."""
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


# ----------------------------------------------------------------------- text


def prompt_of(scene: Scene) -> str:
    """The brief prompt: a dozen to thirty tokens that fix everything but the positions."""
    objects = f", {scene.relation} ".join(_object_phrase(obj) for obj in scene.objects)
    return f"{objects}, on a {scene.background} background"


def _object_phrase(obj: Object) -> str:
    motion = "staying still" if obj.motion == "still" else f"moving {obj.motion} {obj.speed}"
    return f"a {obj.size} {obj.color} {obj.shape} {motion}"


def caption_of(scene: Scene) -> str:
    """The detailed caption, 128 to 256 tokens with the shipped tokenizer.

    It repeats what the prompt says and adds what only the video shows: where each object is at both ends.
    """
    count, names = "one object", ["the object"]
    if len(scene.objects) == 2:
        count, names = "two objects", ["the first object", "the second object"]
    parts = [f"the video shows {count} on a plain {scene.background} background."]
    parts += [_object_paragraph(name, obj) for name, obj in zip(names, scene.objects, strict=True)]
    if scene.relation:
        parts.append(f"the first object is {scene.relation} the second object for the whole clip.")
    parts.append(
        f"the {scene.background} background keeps the same shade in every frame. nothing else appears, nothing "
        "enters or leaves the frame, the camera does not move, the light is even, and there is no text in the picture."
    )
    return " ".join(parts)


def _object_paragraph(name: str, obj: Object) -> str:
    motion = f"moves {obj.motion} {obj.speed} in a straight line"
    if obj.motion == "still":
        motion = "stays still in the same place"
    return (
        f"{name} is a {obj.size} {obj.color} {obj.shape}. it is filled with an even {obj.color} from edge to edge "
        f"and its outline is that of a {obj.shape}. when the clip begins it is in the {place_of(obj, 0)} part of the "
        f"frame. it {motion} without turning. when the clip ends it is in the {place_of(obj, NUM_FRAMES - 1)} part of "
        f"the frame, and it still looks {obj.size} beside the frame."
    )


def place_of(obj: Object, frame: int) -> str:
    """Which ninth of the frame the centre lies in, such as "upper left" or "middle center"."""
    x, y = obj.center(frame)
    column = ("left", "center", "right")[min(int(3 * x / CANVAS), 2)]
    row = ("upper", "middle", "lower")[min(int(3 * y / CANVAS), 2)]
    return f"{row} {column}"
