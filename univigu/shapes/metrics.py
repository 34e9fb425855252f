"""Exact metrics on the embedded world: what a model wrote or drew against what the scene is.

A text or a clip is first read (:mod:`.shapes_text`, :mod:`.shapes_video`), then compared attribute by attribute.
An attribute of a scene with two objects is right only if it is right for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric

from univigu.shapes.scenes import NUM_FRAMES, SIZES, Object, Scene, Split, sample_scene
from univigu.shapes.text_checker import (
    ObjectReading,
    Reading,
    Source,
    normalize_text,
    parse_caption,
    parse_prompt,
    parse_text,
)
from univigu.shapes.texts import caption_of, prompt_of, region_of
from univigu.shapes.video_checker import detect, holding_relations, relation_gaps

ATTRIBUTES = ("count", "background", "size", "color", "shape", "motion", "speed", "relation", "start", "end")
_SCENE_LEVEL = ("count", "background")
_OBJECT_LEVEL = ("size", "color", "shape", "motion")


# ---------------------------------------------------------------------- comparing


def reading_of(scene: Scene, source: Source = "caption") -> Reading:
    """The true reading of a scene: what a faultless prompt, caption or video of it says."""
    objects = tuple(_true_object(obj, source) for obj in scene.objects)
    other = None
    if source == "video" and len(scene.objects) == 2:
        first, second = (_true_boxes(obj) for obj in scene.objects)
        holding = holding_relations(relation_gaps(first, second))
        other = next((name for name in holding if name != scene.relation), None)
    return Reading(source, len(objects), scene.background, scene.relation, objects, other)


def _true_object(obj: Object, source: Source) -> ObjectReading:
    start, end = (
        (region_of(obj.center(0)), region_of(obj.center(NUM_FRAMES - 1))) if source != "prompt" else (None, None)
    )
    center = obj.center(0) if source == "video" else None
    return ObjectReading(obj.size, obj.color, obj.shape, obj.motion, obj.speed, start, end, center)


def _true_boxes(obj: Object) -> np.ndarray:
    centers = np.array([obj.center(frame) for frame in range(NUM_FRAMES)])
    return np.concatenate([centers - SIZES[obj.size], centers + SIZES[obj.size]], -1)


def score(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Whether each attribute of a scene was read right.

    Args:
        reading: from a prompt, a caption or a video.
        scene: the truth.

    Returns:
        count, background, size, color, shape, motion; speed where the scene has a moving object (only moving
        objects count), relation where it has two objects, start and end where the reading is no prompt's.
    """
    return _compare(reading, reading_of(scene, reading.source))


def agreement(caption_reading: Reading, video_reading: Reading) -> dict[str, bool]:
    """Whether a caption and a video show the same, attribute by attribute, with the caption as the reference.

    What the reference leaves open or contradicts does not agree.  The attributes are those of :func:`score`.
    """
    return _compare(video_reading, caption_reading)


def _compare(reading: Reading, truth: Reading) -> dict[str, bool]:
    result = {name: _same(getattr(reading, name), getattr(truth, name)) for name in _SCENE_LEVEL}
    ours, true = _in_order_of(reading, truth), truth.objects
    aligned = len(ours) == len(true) > 0
    names = _OBJECT_LEVEL if "prompt" in (reading.source, truth.source) else (*_OBJECT_LEVEL, "start", "end")
    for name in names:
        same = (_same(getattr(a, name), getattr(b, name)) for a, b in zip(ours, true, strict=False))
        result[name] = aligned and all(same)
    moving = [i for i, obj in enumerate(true) if obj.motion not in ("still", None) or obj.speed]
    if moving:
        result["speed"] = aligned and all(_same(ours[i].speed, true[i].speed) for i in moving)
    if len(true) == 2:
        relations = [name for name in (reading.relation, reading.other_relation) if name]
        result["relation"] = truth.relation in relations
    return result


def _same(value: Any, truth: Any) -> bool:
    return value is not None and value == truth


def _in_order_of(reading: Reading, truth: Reading) -> tuple[ObjectReading, ...]:
    """A reading's objects, sorted along the truth's relation if a video shows that one as well as its own."""
    objects = reading.objects
    if len(objects) != 2 or reading.other_relation is None or reading.other_relation != truth.relation:
        return objects
    axis = 1 if truth.relation == "above" else 0
    return tuple(sorted(objects, key=lambda obj: obj.center[axis] if obj.center else 0.0))


@lru_cache(maxsize=16)
def chance_levels(source: Source = "caption", split: Split = "val", num_scenes: int = 1000) -> Mapping[str, float]:
    """Accuracies of a model that answers with another scene of the same distribution, whatever it is shown.

    Estimated from the sampler: the true readings of scenes 0..num_scenes-1 of a split are scored against those of
    other scenes, 20 pairings each, so the standard error is below half a percent for 1000 scenes.

    Returns:
        The keys of a metric's ``compute``: the attributes, "mean" and "exact".
    """
    readings = [reading_of(sample_scene(seed, split), source) for seed in range(num_scenes)]
    tally = _Tally()
    for shift in range(1, 21):
        for i, truth in enumerate(readings):
            tally.add(_compare(readings[(i + shift) % num_scenes], truth))
    return tally.accuracies()


class _Tally:
    """Counts of right and scored answers an attribute, and of samples right in all of them."""

    def __init__(self) -> None:
        self.right = [0] * len(ATTRIBUTES)
        self.scored = [0] * len(ATTRIBUTES)
        self.exact = 0
        self.samples = 0

    def add(self, result: Mapping[str, bool]) -> None:
        for i, name in enumerate(ATTRIBUTES):
            if name in result:
                self.right[i] += result[name]
                self.scored[i] += 1
        self.exact += all(result.values())
        self.samples += 1

    def accuracies(self) -> dict[str, float]:
        """Accuracy of each attribute that was scored at all, their mean, and the share of exact samples."""
        pairs = zip(ATTRIBUTES, self.right, self.scored, strict=True)
        values = {name: right / scored for name, right, scored in pairs if scored}
        mean = sum(values.values()) / max(len(values), 1)
        return {**values, "mean": mean, "exact": self.exact / max(self.samples, 1)}


# ------------------------------------------------------------------------ metrics


class _ShapesMetric(Metric):
    """Sums over samples, so that the ranks of a run add up to what one process would have counted."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: torch.Tensor
    scored: torch.Tensor
    exact: torch.Tensor
    samples: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros(len(ATTRIBUTES), dtype=torch.int64)
        self.add_state("right", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("scored", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("exact", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, results: Sequence[Mapping[str, bool]]) -> None:
        tally = _Tally()
        for result in results:
            tally.add(result)
        self.right += torch.tensor(tally.right, device=self.right.device)
        self.scored += torch.tensor(tally.scored, device=self.scored.device)
        self.exact += tally.exact
        self.samples += tally.samples

    def compute(self) -> dict[str, torch.Tensor]:
        """Accuracies in [0, 1]: the attributes scored so far, "mean" over them, "exact" (all right in a sample).

        Attributes that no sample had are left out; with no sample at all "mean" and "exact" are 0, never NaN.
        """
        tally = _Tally()
        tally.right, tally.scored = self.right.tolist(), self.scored.tolist()
        tally.exact, tally.samples = int(self.exact), int(self.samples)
        return {name: torch.tensor(value, device=self.right.device) for name, value in tally.accuracies().items()}


class ShapesTextAccuracy(_ShapesMetric):
    """How much of each scene a generated text states rightly; ``compute`` also has "exact_text".

    Args:
        kind: what the texts are meant to be, "caption" or "prompt".

    Raises:
        ValueError: for another kind.
    """

    exact_text: torch.Tensor

    def __init__(self, kind: str = "caption", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if kind not in ("caption", "prompt"):
            raise ValueError(f"kind={kind!r}: expected 'caption' or 'prompt'")
        self.parse, self.write = (parse_caption, caption_of) if kind == "caption" else (parse_prompt, prompt_of)
        self.add_state("exact_text", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], scenes: Sequence[Scene | Mapping[str, Any] | None]) -> None:
        """Count a batch; samples without a scene (None: not of the embedded world) are passed over."""
        pairs = [(text, scene) for text, scene in zip(texts, map(_scene, scenes), strict=True) if scene is not None]
        self._add([score(self.parse(text), scene) for text, scene in pairs])
        self.exact_text += sum(normalize_text(text) == normalize_text(self.write(scene)) for text, scene in pairs)

    def compute(self) -> dict[str, torch.Tensor]:
        """As the base class, and "exact_text": the share of texts equal to the scene's own after normalisation."""
        return {**super().compute(), "exact_text": self.exact_text / self.samples.clamp_min(1)}


class ShapesVideoAccuracy(_ShapesMetric):
    """How much of each scene a generated clip shows rightly.

    Args:
        places: whether start and end places count; no prompt fixes them, so clips made from prompts go without.
    """

    def __init__(self, places: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.left_out = () if places else ("start", "end")

    def update(self, frames: torch.Tensor, scenes: Sequence[Scene | Mapping[str, Any] | None]) -> None:
        """Count a batch of clips, uint8 [B, F, C, H, W]; samples without a scene (None) are passed over."""
        known = [(clip, scene) for clip, scene in zip(frames, map(_scene, scenes), strict=True) if scene is not None]
        results = [score(detect(clip), scene) for clip, scene in known]
        self._add([{k: v for k, v in result.items() if k not in self.left_out} for result in results])


class ShapesAgreement(_ShapesMetric):
    """Whether captions and videos drawn together show the same; needs no truth."""

    def update(self, captions: Sequence[str], frames: torch.Tensor) -> None:
        """Count a batch of captions and their clips, uint8 [B, F, C, H, W]."""
        self._add([agreement(parse_text(c), detect(clip)) for c, clip in zip(captions, frames, strict=True)])


def _scene(scene: Scene | Mapping[str, Any] | None) -> Scene | None:
    return scene if scene is None or isinstance(scene, Scene) else Scene.from_dict(dict(scene))
