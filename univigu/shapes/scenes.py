"""The embedded world: short clips of moving shapes whose every property is known.

A ``Scene`` is the single source of truth.  The frames (``renderer``) and the texts (``texts``) are made
from it, so both directions of the unified model can be checked exactly (``metrics``).

One fifth of all (colour, shape, motion) triples is held out of training.  ``is_held_out`` is a Latin design: every
*pair* of properties occurs in training, only the combination of three is new.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

SIZES = {"small": 11, "large": 15}  # half the side of the bounding box, in canvas pixels
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
SPEEDS = {"slowly": 2.0, "quickly": 4.0}  # canvas pixels per frame: one and two grid cells in 4 frames
BACKGROUNDS = {
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "white": (240, 240, 240),
    "brown": (110, 70, 35),
}
RELATIONS = ("left of", "above")

CANVAS = 64  # pixels; all lengths in this package refer to this canvas
# Start positions lie on a grid of the latents' stride, so the VAE sees the same shape at every position.  Small objects
# are centred on a cell, large ones on a corner, so that two lanes hold either size.
GRID = 8
NUM_FRAMES = 9  # 4k+1, as Wan's VAE requires
FPS = 8

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Object:
    """One object of a scene."""

    size: str
    color: str
    shape: str
    motion: str
    speed: str
    """One of ``SPEEDS``, or "" for an object that stays still."""
    x: float
    """Centre in the first frame, in canvas pixels."""
    y: float

    def center(self, frame: float) -> tuple[float, float]:
        dx, dy = MOTIONS[self.motion]
        step = SPEEDS.get(self.speed, 0.0) * frame
        return self.x + dx * step, self.y + dy * step


@dataclass(frozen=True)
class Scene:
    """The full description of a clip."""

    objects: tuple[Object, ...]
    """One or two objects, the left or upper one first."""
    background: str
    relation: str
    """Of the first object to the second ("left of", "above"); "" for one object."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        """The inverse of ``to_dict``; raises KeyError or TypeError if fields are missing or unknown."""
        objects = tuple(Object(**obj) for obj in data["objects"])
        return cls(objects=objects, background=data["background"], relation=data["relation"])


def is_scene(value: Any) -> bool:
    """Whether a JSON value describes a scene of this world, and not the "scene" field of another data set."""
    try:
        scene = Scene.from_dict(value)
        relations = {1: ("",), 2: RELATIONS}.get(len(scene.objects), ())
        known = scene.background in BACKGROUNDS and scene.relation in relations
        for obj in scene.objects:
            known &= obj.size in SIZES and obj.color in COLORS and obj.shape in SHAPES and obj.motion in MOTIONS
            known &= obj.speed in (("",) if obj.motion == "still" else tuple(SPEEDS)) and math.isfinite(obj.x + obj.y)
        return known
    except (KeyError, TypeError, OverflowError):
        return False


def is_held_out(obj: Object) -> bool:
    """Whether the (colour, shape, motion) triple of an object is kept out of training."""
    index = list(COLORS).index(obj.color) + SHAPES.index(obj.shape) + list(MOTIONS).index(obj.motion)
    return index % len(SHAPES) == 0


def sample_scene(seed: int, split: Split = "train") -> Scene:
    """Draw the scene of a non-negative seed: in "train" without held-out triples, in "val" and "test" with one."""
    streams = {"train": 0, "val": 1, "test": 2}
    if split not in streams:
        raise ValueError(f"split={split!r}: expected one of {list(streams)}")
    rng = np.random.default_rng([seed, streams[split]])
    while True:
        scene = _draw_scene(rng)
        if any(map(is_held_out, scene.objects)) == (split != "train"):
            return scene


def _draw_scene(rng: np.random.Generator) -> Scene:
    background = _pick(rng, BACKGROUNDS)
    if rng.random() < 0.5:
        return Scene((_draw_object(rng, MOTIONS, (0, 0, CANVAS, CANVAS)),), background, "")
    # Two objects stay in lanes perpendicular to their relation, so they never meet and the relation holds throughout.
    relation = _pick(rng, RELATIONS)
    half = CANVAS // 2
    if relation == "left of":
        motions, lanes = ("up", "down", "still"), ((0, 0, half, CANVAS), (half, 0, CANVAS, CANVAS))
    else:
        motions, lanes = ("left", "right", "still"), ((0, 0, CANVAS, half), (0, half, CANVAS, CANVAS))
    first, second = (_draw_object(rng, motions, lane) for lane in lanes)
    # Colours tell the objects apart. One object moves, because the axis of motion tells the two relations apart.
    while second.color == first.color or first.motion == second.motion == "still":
        second = _draw_object(rng, motions, lanes[1])
    return Scene((first, second), background, relation)


def _draw_object(rng: np.random.Generator, motions: Iterable[str], lane: tuple[int, int, int, int]) -> Object:
    size, color, shape = _pick(rng, SIZES), _pick(rng, COLORS), _pick(rng, SHAPES)
    motion = _pick(rng, motions)
    speed = "" if motion == "still" else _pick(rng, SPEEDS)
    radius = SIZES[size] + 1
    left, top, right, bottom = lane
    while True:  # until the whole path lies inside the lane
        x = _grid_point(rng, left + radius, right - radius, size)
        y = _grid_point(rng, top + radius, bottom - radius, size)
        obj = Object(size, color, shape, motion, speed, x, y)
        end = obj.center(NUM_FRAMES - 1)
        if left + radius <= end[0] <= right - radius and top + radius <= end[1] <= bottom - radius:
            return obj


def _grid_point(rng: np.random.Generator, low: float, high: float, size: str) -> float:
    """A random grid coordinate between ``low`` and ``high`` for objects of this size; see ``GRID``."""
    first = GRID // 2 if size == "small" else 0
    return float(rng.choice([v for v in range(first, CANVAS, GRID) if low <= v <= high]))


def _pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    return str(rng.choice(list(options)))
