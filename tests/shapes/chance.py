"""What a model scores that ignores its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np

from univigu.shapes.metrics import AttributeAccuracy, agreement, reading_of
from univigu.shapes.scenes import NUM_FRAMES, SIZES, Scene, Split, sample_scene
from univigu.shapes.text_checker import Reading, Source
from univigu.shapes.video_checker import holding_relations


@lru_cache(maxsize=16)
def chance_levels(source: Source = "caption", split: Split = "val", num_scenes: int = 1000) -> Mapping[str, float]:
    """Accuracies of a model that describes another random scene of the split, whatever its input.

    The true readings of scenes 0..num_scenes-1 are scored against those of other scenes, 20 pairings each, so the
    standard error is below half a percent for 1000 scenes. The keys are those of a metric's ``compute``.
    """
    readings = [_reading_of(sample_scene(seed, split), source) for seed in range(num_scenes)]
    metric, shifts = AttributeAccuracy(), range(1, 21)
    metric.update(
        [agreement(truth, readings[(i + k) % num_scenes]) for k in shifts for i, truth in enumerate(readings)]
    )
    return {name: value.item() for name, value in metric.compute().items()}


def _reading_of(scene: Scene, source: Source) -> Reading:
    """As ``detect`` gives it: with the second relation that a video shows just as well."""
    reading = reading_of(scene, source)
    if source != "video" or len(scene.objects) != 2:
        return reading
    boxes = []
    for obj in scene.objects:
        centers = np.array([obj.center(frame) for frame in range(NUM_FRAMES)])
        boxes.append(np.concatenate([centers - SIZES[obj.size], centers + SIZES[obj.size]], -1))
    other = next((name for name in holding_relations(*boxes) if name != scene.relation), None)
    return replace(reading, other_relation=other)
