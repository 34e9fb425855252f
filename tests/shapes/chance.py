"""What a model scores that ignores its input."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from univigu.shapes.metrics import AttributeAccuracy, agreement, reading_of
from univigu.shapes.scenes import Split, sample_scene
from univigu.shapes.text_checker import Source


@lru_cache(maxsize=16)
def chance_levels(source: Source = "caption", split: Split = "val", num_scenes: int = 1000) -> Mapping[str, float]:
    """Accuracies of a model that describes another random scene of the split, whatever its input.

    The true readings of scenes 0..num_scenes-1 are scored against those of other scenes, 20 pairings each, so the
    standard error is below half a percent for 1000 scenes. The keys are those of a metric's ``compute``.
    """
    readings = [reading_of(sample_scene(seed, split), source) for seed in range(num_scenes)]
    metric, shifts = AttributeAccuracy(), range(1, 21)
    metric.update(
        [agreement(truth, readings[(i + k) % num_scenes]) for k in shifts for i, truth in enumerate(readings)]
    )
    return metric.accuracies()
