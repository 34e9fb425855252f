"""Reads clips of the embedded world: finds the objects by colour, then tracks and measures each.

Everything is measured on the world's canvas of 64x64 pixels; clips of another size are resized first.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from univigu.shapes.renderer import shape_mask
from univigu.shapes.scenes import BACKGROUNDS, CANVAS, COLORS, RELATIONS, SHAPES, SIZES, SPEEDS
from univigu.shapes.text_checker import ObjectReading, Reading
from univigu.shapes.texts import region_of

# Thresholds in 8-bit colour units.  The smallest contrast of an object is 114 (red on brown), the smallest distance of
# two object colours 118 (blue, purple) and of two backgrounds 110 (gray, brown).
FOREGROUND_CONTRAST = 40.0  # a pixel that differs more from the background is foreground
MAX_BACKGROUND_ERROR = 45.0  # a background further than this from every known one has no name
MAX_COLOR_ERROR = 90.0  # the same for an object's colour
# Lengths in canvas pixels over the clip: slow objects move 16, quick ones 32.
STILL_BELOW = 8.0
QUICK_FROM = 24.0
MIN_COVER = 0.2  # share of a pixel; less is noise
MIN_CORE_AREA = 20.0  # pixels per frame; the smallest object, the small triangle, has over three times that
MIN_SHAPE_IOU = 0.6
# Pixels by which boxes may overlap and still be left of or above each other; more if only one relation can hold.
MAX_BOX_OVERLAP = 2.0
MAX_BLUR_OVERLAP = 8.0


@dataclass
class _Track:
    """One object's pixels and their measures in every frame; NaN where it is not seen."""

    color: np.ndarray  # mean colour, RGB [3]
    cover: np.ndarray  # how much of each pixel the object covers, in [0, 1], [F, 64, 64]
    centroid: np.ndarray  # centre of gravity (x, y) [F, 2]
    boxes: np.ndarray  # bounding boxes (left, top, right, bottom) [F, 4]
    pieces: int  # median number of separate blobs of this colour in a frame

    @property
    def seen(self) -> np.ndarray:
        """In which frames the object is seen, bool [F]."""
        return ~np.isnan(self.centroid[:, 0])


def detect(frames: torch.Tensor) -> Reading:
    """Read a clip of the embedded world, uint8 [F, 3, H, W] of any size, from its pixels alone.

    What cannot be determined is None; a clip without objects has count 0.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[0] == 0 or frames.dtype != torch.uint8:
        raise ValueError(f"expected uint8 [F, 3, H, W] with F > 0, got {frames.dtype} {list(frames.shape)}")
    resized = F.interpolate(frames.detach().cpu().float(), (CANVAS, CANVAS), mode="bilinear", antialias=True)
    pixels = np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())  # [F, 64, 64, 3]

    sides = (pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:])  # objects cover little of the border
    border = np.concatenate([side.reshape(len(pixels), -1, 3) for side in sides], 1)
    ground = np.median(border, axis=1)  # [F, 3], per frame, so that flicker is not taken for objects
    background = _nearest(np.median(ground, axis=0), BACKGROUNDS, MAX_BACKGROUND_ERROR)
    tracks = _find_objects(pixels - ground[:, None, None], ground)
    objects = [_measure(track) for track in tracks]
    count = sum(track.pieces for track in tracks)
    if len(objects) != 2:
        objects.sort(key=lambda obj: (obj.center or (0.0, 0.0))[0])
        return Reading("video", count, background, "" if count == 1 else None, tuple(objects))
    relations, motions = holding_relations(tracks[0].boxes, tracks[1].boxes), {obj.motion for obj in objects}
    vertical, horizontal = bool(motions & {"up", "down"}), bool(motions & {"left", "right"})
    if len(relations) == 2 and vertical != horizontal:  # objects of the world move perpendicular to their relation
        relations = ["left of", "above"] if vertical else ["above", "left of"]
    relation, other = (*relations, None, None)[:2]
    axis = 1 if relation == "above" else 0
    middles = [np.nanmean(track.boxes[:, axis] + track.boxes[:, axis + 2]) for track in tracks]
    if middles[0] > middles[1]:  # the left or upper object comes first
        objects.reverse()
    return Reading("video", count, background, relation, tuple(objects), other)


def _find_objects(difference: np.ndarray, ground: np.ndarray) -> list[_Track]:
    """Objects in order of area, from the difference [F, 64, 64, 3] to the background colour [F, 3]."""
    contrast = np.einsum("fhwc,fhwc->fhw", difference, difference)
    # Edges are mixtures with the background and, in compressed chroma, with anything: only cores vote on colours.
    core = _box_sum(contrast > FOREGROUND_CONTRAST**2, 1) == 9
    palette = np.array(list(COLORS.values()), np.float32) - ground[:, None]  # [F, 6, 3]
    label = _nearest_mixture(difference, core, palette)
    candidates = [_majority(label == k, core) for k in range(len(COLORS))]
    # large enough in more than half of the frames
    cores = _merge_overlapping([c for c in candidates if (c.sum((1, 2)) >= MIN_CORE_AREA).mean() > 0.5])
    if not cores:
        return []
    colors = np.stack([np.median(difference[c], axis=0) for c in cores])  # as measured
    owner = np.zeros(core.shape, np.int64)
    if len(cores) > 1:  # assign again, by the measured colours, which separate better than the palette's
        visible = contrast > (FOREGROUND_CONTRAST / 2) ** 2
        owner = _nearest_mixture(difference, visible, np.broadcast_to(colors, (len(ground), *colors.shape)))
        cores = [_majority(core & (owner == k), core) for k in range(len(colors))]
    tracks = []
    for k, color in enumerate(colors):
        near = _box_sum(cores[k], 3) > 0  # restores what the erosion removed, and excludes distant noise
        cover = (difference @ (color / max(color @ color, 1.0))).clip(0.0, 1.0)
        cover[~near | (owner != k) | (cover < MIN_COVER)] = 0.0
        pieces = int(np.median([_drop_specks(frame) for frame in cover]))
        track = _Track(color + np.median(ground, axis=0), cover, *_moments(cover, cover > 0.5), pieces)
        if track.seen.mean() > 0.5:
            tracks.append(track)
    return tracks


def _box_sum(mask: np.ndarray, reach: int) -> np.ndarray:
    """Number of set pixels in the square of side 2*reach + 1 around each pixel of bool masks [F, 64, 64]."""
    side = 2 * reach + 1
    return F.avg_pool2d(torch.from_numpy(mask).float(), side, 1, reach, divisor_override=1).numpy()


def _nearest_mixture(difference: np.ndarray, where: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Which of the colours [F, K, 3] explains a pixel best as a mixture of it and the background at any ratio.

    Colours and pixels [F, 64, 64, 3] are differences to the background; pixels outside of ``where`` get -1.
    """
    pixels, colors = difference[where], colors[where.nonzero()[0]]  # [N, 3], [N, K, 3]
    square = np.maximum(np.einsum("nkc,nkc->nk", colors, colors), 1.0)
    product = np.einsum("nkc,nc->nk", colors, pixels)
    ratio = (product / square).clip(0.0, 1.1)
    label = np.full(where.shape, -1)
    label[where] = (ratio * (ratio * square - 2 * product)).argmin(1)  # squared error minus the pixel's own square
    return label


def _majority(own: np.ndarray, core: np.ndarray) -> np.ndarray:
    """A core without the pixels whose neighbourhood is mostly others': compression mixes hues of adjacent objects."""
    return own & (2 * _box_sum(own, 2) > _box_sum(core, 2))


def _merge_overlapping(cores: list[np.ndarray]) -> list[np.ndarray]:
    """Join a core to a larger one that surrounds or broadly adjoins it; cores of different objects do not adjoin."""
    merged: list[np.ndarray] = []
    for core in sorted(cores, key=lambda c: -int(c.sum())):
        for i, larger in enumerate(merged):
            center, box = _moments(core.astype(np.float32), core)[0], _moments(larger.astype(np.float32), larger)[1]
            inside = ((center > box[:, :2]) & (center < box[:, 2:])).all(-1)
            border = (core & (_box_sum(larger, 1) > 0)).sum((1, 2))
            adjoins = border > 0.6 * np.sqrt(np.maximum(core.sum((1, 2)), 1))
            if (inside | adjoins).mean() > 0.5:
                merged[i] = larger | core
                break
        else:
            merged.append(core)
    return merged


def _moments(weight: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre of gravity (x, y) [F, 2] of the weights and box [F, 4] of the mask, both [F, 64, 64]; NaN if empty."""
    at = np.arange(CANVAS, dtype=np.float32) + 0.5
    total = weight.sum((1, 2))
    seen = (total > 0) & mask.any((1, 2))
    safe = np.where(seen, total, 1.0)
    centroid = np.stack([weight.sum(1) @ at, weight.sum(2) @ at], -1) / safe[:, None]
    columns, rows = np.asarray(mask.any(1)), np.asarray(mask.any(2))
    lows = [columns.argmax(1), rows.argmax(1)]
    highs = [CANVAS - columns[:, ::-1].argmax(1), CANVAS - rows[:, ::-1].argmax(1)]
    boxes = np.stack(lows + highs, -1).astype(np.float32)
    centroid[~seen], boxes[~seen] = np.nan, np.nan
    return centroid, boxes


def _drop_specks(cover: np.ndarray) -> int:
    """Erase small parts of one frame's cover [64, 64] that gaps in the row or column sums separate.

    Returns the number of remaining blobs, at least 1; the shapes have no such gaps.
    """
    pieces = 1
    for image in (cover, cover.T):  # two views of one array
        sums = np.count_nonzero(image > 0.5, axis=0)
        edges = np.flatnonzero(np.diff(np.asarray(sums > 0, np.int8), prepend=0, append=0))
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        areas = [sums[start:end].sum() for start, end in runs]
        if len(runs) > 1:
            least = max(MIN_CORE_AREA, 0.2 * max(areas))
            for (start, end), area in zip(runs, areas, strict=True):
                if area < least:
                    image[:, start:end] = 0.0
            pieces = max(pieces, sum(int(area >= least) for area in areas))
    return pieces


def _measure(track: _Track) -> ObjectReading:
    size, shape = _size_and_shape(track)
    middle = _center(track, shape, SIZES[size])
    seen = np.flatnonzero(track.seen)
    motion, speed = _motion(middle[seen], seen)
    color = _nearest(track.color, COLORS, MAX_COLOR_ERROR)
    start, end = ((float(x), float(y)) for x, y in (middle[seen[0]], middle[seen[-1]]))
    first = region_of(start) if seen[0] == 0 else None
    last = region_of(end) if seen[-1] == len(middle) - 1 else None
    return ObjectReading(size, color, shape, motion, speed, first, last, start)


def _center(track: _Track, shape: str | None, radius: float) -> np.ndarray:
    """Centre of the shape's box [F, 2], from the centre of gravity, which noise moves less than the box."""
    if shape is None:
        return (track.boxes[:, :2] + track.boxes[:, 2:]) / 2
    # a triangle's centre of gravity lies a third of its height from the base
    return track.centroid - np.array([0.0, radius / 3 if shape == "triangle" else 0.0])


def _size_and_shape(track: _Track) -> tuple[str, str | None]:
    """The size and shape whose ideal cover overlaps best; if none does well, no shape and the size nearest to the box.

    The box alone is not enough: blur removes a triangle's tip, and with it half of what makes it large.
    """
    seen = track.seen
    reach = max(SIZES.values()) + 4  # compare this many pixels around the centre: contains any object
    padded = np.pad(track.cover[seen], ((0, 0), (reach, reach), (reach, reach)))
    corner = track.centroid[seen].astype(int)  # in padded pixels: reach to the left of and above the centre
    window = np.arange(2 * reach)
    columns, rows = corner[:, :1] + window, corner[:, 1:] + window  # [F, 2 * reach]
    cover = padded[np.arange(len(padded))[:, None, None], rows[:, :, None], columns[:, None, :]]
    at = (np.arange(4 * reach) + 0.5) / 2  # twice the resolution, for the edges
    overlaps = {}
    for size, shape in itertools.product(SIZES, SHAPES):
        offset = _center(track, shape, SIZES[size])[seen] - corner + reach
        fine = shape_mask(shape, at - offset[:, :1, None], at[:, None] - offset[:, 1:, None], SIZES[size])
        ideal = F.avg_pool2d(torch.from_numpy(fine).float(), 2)
        # sharp or blurred by 3x3 pixels, because edges from a VAE are soft
        blurred = (image.numpy() for image in (ideal, F.avg_pool2d(ideal, 3, 1, 1)))
        ious = [np.minimum(cover, i).sum((1, 2)) / np.maximum(cover, i).sum((1, 2)) for i in blurred]
        overlaps[size, shape] = max(float(iou.mean()) for iou in ious)
    best = max(overlaps, key=overlaps.__getitem__)
    if overlaps[best] >= MIN_SHAPE_IOU:
        return best
    extent = (track.boxes[:, 2:] - track.boxes[:, :2])[seen]  # [N, 2]
    half = float(np.median(extent, axis=0).mean()) / 2
    return min(SIZES, key=lambda name: abs(SIZES[name] - half)), None


def _motion(centers: np.ndarray, frames: np.ndarray) -> tuple[str | None, str | None]:
    """Motion and speed of a path [N, 2] at the given frame numbers [N], by the slope of its least-squares line."""
    if len(frames) < 2:
        return None, None
    offset = frames - frames.mean()
    slope = offset @ (centers - centers.mean(0)) / (offset @ offset)
    dx, dy = slope * (frames[-1] - frames[0])
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if along < STILL_BELOW:
        return "still", ""
    speed = tuple(SPEEDS)[int(along >= QUICK_FROM)]
    if across > along / 2:  # diagonal: none of the world's motions
        return None, speed
    motion = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
    return motion, speed


def _nearest(color: np.ndarray, names: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    distance, best = min((float(np.linalg.norm(color - np.array(value))), name) for name, value in names.items())
    return best if distance <= limit else None


def holding_relations(first: np.ndarray, second: np.ndarray) -> list[str]:
    """The relations of two objects, in either order, that hold for the whole clip, the clearest first.

    Boxes [F, 4] are (left, top, right, bottom) in canvas pixels, NaN where the object is not seen.
    """
    both = ~np.isnan(first[:, 0] + second[:, 0])
    if not both.any():
        return []
    a, b = first[both], second[both]
    # the smallest gap between the boxes, negative if they overlap
    gaps = {name: max((b[:, i] - a[:, i + 2]).min(), (a[:, i] - b[:, i + 2]).min()) for i, name in enumerate(RELATIONS)}
    order = sorted(gaps, key=lambda relation: -gaps[relation])
    holding = [relation for relation in order if gaps[relation] >= -MAX_BOX_OVERLAP]
    # blur can make neighbours touch: then only the clearer one counts
    return holding or [relation for relation in order[:1] if gaps[relation] >= -MAX_BLUR_OVERLAP]
