"""Exact metrics on the embedded world: compare what a model wrote or drew with the scene.

A text or a clip is first parsed (``text_checker``, ``video_checker``), then compared attribute by attribute.
An attribute of a scene with two objects is right only if it is right for both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric

from univigu.shapes.scenes import NUM_FRAMES, Scene
from univigu.shapes.text_checker import ObjectReading, Reading, Source, normalize_text, parse_caption, parse_prompt
from univigu.shapes.texts import caption_of, prompt_of, region_of

ATTRIBUTES = ("count", "background", "size", "color", "shape", "motion", "speed", "relation", "start", "end")
COUNTED = (*ATTRIBUTES, "exact", "exact_text")


def reading_of(scene: Scene, source: Source = "caption") -> Reading:
    """The true reading of a scene: what a perfect prompt, caption or video of it contains."""
    objects = []
    for obj in scene.objects:
        start, end = (None if source == "prompt" else region_of(obj.center(i)) for i in (0, NUM_FRAMES - 1))
        center = obj.center(0) if source == "video" else None
        objects.append(ObjectReading(obj.size, obj.color, obj.shape, obj.motion, obj.speed, start, end, center))
    return Reading(source, len(objects), scene.background, scene.relation, tuple(objects))


def score(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Whether each attribute of a scene was read correctly."""
    return agreement(reading_of(scene, reading.source), reading)


def agreement(truth: Reading, reading: Reading) -> dict[str, bool]:
    """Whether a reading agrees with a reference, by attribute; an attribute that one of them does not state is wrong.

    "speed" is there if the reference has a moving object, "relation" if it has two, "start" and "end" unless one
    reading is of a prompt.
    """
    result = {name: _same(reading, truth, name) for name in ("count", "background")}
    objects, true = _in_order_of(reading, truth), truth.objects
    aligned = len(objects) == len(true) > 0
    pairs = list(zip(objects, true, strict=False))
    positions = () if "prompt" in (reading.source, truth.source) else ("start", "end")
    for name in ("size", "color", "shape", "motion", *positions):
        result[name] = aligned and all(_same(*pair, name) for pair in pairs)
    if any(map(_moves, true)):
        result["speed"] = aligned and all(_same(*pair, "speed") for pair in pairs if _moves(pair[1]))
    if len(true) == 2:
        result["relation"] = bool(truth.relation) and truth.relation in (reading.relation, reading.other_relation)
    return result


def _moves(obj: ObjectReading) -> bool:
    return obj.motion not in ("still", None) or bool(obj.speed)


def _same(value: Any, truth: Any, name: str) -> bool:
    found = getattr(value, name)
    return found is not None and found == getattr(truth, name)


def _in_order_of(reading: Reading, truth: Reading) -> tuple[ObjectReading, ...]:
    """The reading's objects, reordered along the true relation if that is the video's second relation."""
    objects = reading.objects
    if len(objects) != 2 or reading.other_relation is None or reading.other_relation != truth.relation:
        return objects
    axis = 1 if truth.relation == "above" else 0
    return tuple(sorted(objects, key=lambda obj: obj.center[axis] if obj.center else 0.0))


class AttributeAccuracy(Metric):
    """Accuracy by attribute; the states are sums over samples, so ranks add up to what one process would count."""

    is_differentiable, higher_is_better, full_state_update = False, True, False
    right: torch.Tensor
    scored: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("right", "scored"):
            self.add_state(name, torch.zeros(len(COUNTED), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def samples(self) -> int:
        """Number of samples added."""
        return int(self.scored[COUNTED.index("exact")])

    def update(self, results: Iterable[Mapping[str, bool]], exact_texts: Sequence[bool] = ()) -> None:
        """Add samples: whether each of their attributes is right, and whether their texts equal the true ones."""
        rows = [{**result, "exact": all(result.values())} for result in results]
        rows += [{"exact_text": value} for value in exact_texts]
        scored = Counter(name for row in rows for name in row)
        right = Counter(name for row in rows for name, value in row.items() if value)
        self.scored += torch.tensor([scored[name] for name in COUNTED], device=self.scored.device)
        self.right += torch.tensor([right[name] for name in COUNTED], device=self.right.device)

    def compute(self) -> dict[str, torch.Tensor]:
        """Accuracies of the attributes that samples had, their "mean", if there are any, "exact" and "exact_text"."""
        counts = zip(COUNTED, self.right.tolist(), self.scored.tolist(), strict=True)
        values = {name: right / scored for name, right, scored in counts if scored}
        attributes = {name: values.pop(name) for name in ATTRIBUTES if name in values}
        if attributes:  # the kinds of questions of other data are none of them
            values = {**attributes, "mean": sum(attributes.values()) / len(attributes), **values}
        return {name: torch.tensor(value, device=self.right.device) for name, value in values.items()}


class ShapesTextAccuracy(AttributeAccuracy):
    """How much of each scene a generated text ("caption" or "prompt") states correctly."""

    def __init__(self, kind: str = "caption", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parse, self.write = {"caption": (parse_caption, caption_of), "prompt": (parse_prompt, prompt_of)}[kind]

    def update(self, texts: Sequence[str], scenes: Sequence[Scene | Mapping[str, Any] | None]) -> None:  # type: ignore[override]
        """Add a batch; samples without a scene (None: not of the embedded world) are ignored."""
        known = [(text, scene) for text, scene in zip(texts, scenes, strict=True) if scene is not None]
        pairs = [(text, s if isinstance(s, Scene) else Scene.from_dict(dict(s))) for text, s in known]
        exact_texts = [normalize_text(text) == normalize_text(self.write(scene)) for text, scene in pairs]
        super().update([score(self.parse(text), scene) for text, scene in pairs], exact_texts)
