"""Exact metrics on the embedded world: compare what a model wrote or drew with the scene.

A text or a clip is first parsed (``text_checker``, ``video_checker``), then compared attribute by attribute.
An attribute of a scene with two objects is right only if it is right for both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric

from univigu.shapes import text_checker
from univigu.shapes.scenes import NUM_FRAMES, Scene
from univigu.shapes.text_checker import ObjectReading, Reading, Source, normalize_text
from univigu.shapes.texts import caption_of, prompt_of, region_of
from univigu.shapes.video_checker import detect

ATTRIBUTES = ("count", "background", "size", "color", "shape", "motion", "speed", "relation", "start", "end")
POSITIONS = ("start", "end")


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
    names = ("size", "color", "shape", "motion")
    for name in names if "prompt" in (reading.source, truth.source) else names + POSITIONS:
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
    exact: torch.Tensor
    samples: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, shape in (("right", len(ATTRIBUTES)), ("scored", len(ATTRIBUTES)), ("exact", ()), ("samples", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, results: Sequence[Mapping[str, bool]]) -> None:
        """Add samples: whether each of their attributes is right."""
        scored = Counter(name for result in results for name in result)
        right = Counter(name for result in results for name, value in result.items() if value)
        self.scored += torch.tensor([scored[name] for name in ATTRIBUTES], device=self.scored.device)
        self.right += torch.tensor([right[name] for name in ATTRIBUTES], device=self.right.device)
        self.exact += sum(all(result.values()) for result in results)
        self.samples += len(results)

    def compute(self) -> dict[str, torch.Tensor]:
        """Accuracies of the attributes that samples had, their "mean", and "exact" (all right in a sample)."""
        counts = zip(ATTRIBUTES, self.right.tolist(), self.scored.tolist(), strict=True)
        values = {name: right / scored for name, right, scored in counts if scored}
        mean = sum(values.values()) / max(len(values), 1)
        values |= {"mean": mean, "exact": int(self.exact) / max(int(self.samples), 1)}
        return {name: torch.tensor(value, device=self.right.device) for name, value in values.items()}


class ShapesTextAccuracy(AttributeAccuracy):
    """How much of each scene a generated text ("caption" or "prompt") states correctly."""

    exact_text: torch.Tensor

    def __init__(self, kind: str = "caption", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        forms = {"caption": (text_checker.parse_caption, caption_of), "prompt": (text_checker.parse_prompt, prompt_of)}
        if kind not in forms:
            raise ValueError(f"kind={kind!r}: expected caption or prompt")
        self.parse, self.write = forms[kind]
        self.add_state("exact_text", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], scenes: Sequence[Scene | Mapping[str, Any] | None]) -> None:  # type: ignore[override]
        """Add a batch; samples without a scene (None: not of the embedded world) are ignored."""
        pairs = _with_scenes(texts, scenes)
        super().update([score(self.parse(text), scene) for text, scene in pairs])
        self.exact_text += sum(normalize_text(text) == normalize_text(self.write(scene)) for text, scene in pairs)

    def compute(self) -> dict[str, torch.Tensor]:
        """With "exact_text", the share of texts equal to the scene's own after normalisation."""
        return {**super().compute(), "exact_text": self.exact_text / self.samples.clamp_min(1)}


class ShapesVideoAccuracy(AttributeAccuracy):
    """How much of each scene a generated clip shows correctly; a prompt states no start and end positions."""

    def __init__(self, positions: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignored = () if positions else POSITIONS

    def update(self, frames: torch.Tensor, scenes: Sequence[Scene | Mapping[str, Any] | None]) -> None:  # type: ignore[override]
        """Add a batch of clips, uint8 [B, F, C, H, W]; samples without a scene (None) are ignored."""
        results = [score(detect(clip), scene) for clip, scene in _with_scenes(frames, scenes)]
        super().update([{k: v for k, v in result.items() if k not in self.ignored} for result in results])


class ShapesAgreement(AttributeAccuracy):
    """Whether captions and videos that were sampled together show the same; needs no truth."""

    def update(self, captions: Sequence[str], frames: torch.Tensor) -> None:  # type: ignore[override]
        """Add a batch of captions and their clips, uint8 [B, F, C, H, W]."""
        pairs = zip(map(text_checker.parse_text, captions), map(detect, frames), strict=True)
        super().update([agreement(text, video) for text, video in pairs])


def _with_scenes(values: Any, scenes: Sequence[Scene | Mapping[str, Any] | None]) -> list[tuple[Any, Scene]]:
    pairs = [(value, scene) for value, scene in zip(values, scenes, strict=True) if scene is not None]
    return [(value, s if isinstance(s, Scene) else Scene.from_dict(dict(s))) for value, s in pairs]
