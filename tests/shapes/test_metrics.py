"""Scores, chance levels and metrics of the embedded world."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest

from tests.shapes.chance import chance_levels
from univigu.shapes.metrics import (
    ATTRIBUTES,
    AttributeAccuracy,
    ShapesTextAccuracy,
    agreement,
    reading_of,
    score,
)
from univigu.shapes.renderer import render
from univigu.shapes.scenes import Object, Scene, sample_scene
from univigu.shapes.text_checker import Reading, parse_caption
from univigu.shapes.texts import caption_of, prompt_of
from univigu.shapes.video_checker import detect

RING = Object("small", "red", "ring", "right", "quickly", 12.0, 12.0)
SQUARE = Object("large", "blue", "square", "still", "", 30.0, 45.0)
ONE = Scene((RING,), "gray", "")
TWO = Scene((RING, SQUARE), "white", "above")
SCENES = [sample_scene(seed, "val") for seed in range(5000, 5080)]


@pytest.fixture(scope="module")
def video_readings() -> list[Reading]:
    return [detect(render(scene)) for scene in SCENES]


def failed(reading: Reading, scene: Scene) -> set[str]:
    return {name for name, right in score(reading, scene).items() if not right}


def test_keys_follow_the_scene_and_the_source():
    base = {"count", "background", "size", "color", "shape", "motion"}
    still = Scene((SQUARE,), "gray", "")
    assert set(score(reading_of(ONE, "prompt"), ONE)) == base | {"speed"}
    assert set(score(reading_of(ONE), ONE)) == base | {"speed", "start", "end"}
    assert set(score(reading_of(still), still)) == base | {"start", "end"}
    assert set(score(reading_of(TWO, "video"), TWO)) == set(ATTRIBUTES)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"size": "large"}, {"size"}),
        ({"color": "cyan"}, {"color"}),
        ({"shape": "cross"}, {"shape"}),
        ({"motion": "left"}, {"motion", "end", "start"}),
        ({"motion": "still", "speed": ""}, {"motion", "speed", "end"}),
        ({"speed": "slowly"}, {"speed", "end"}),
    ],
)
@pytest.mark.parametrize("scene", [ONE, TWO])
def test_one_wrong_attribute_of_one_object(scene, change, wrong):
    x = 45.0 if change.get("motion") == "left" else RING.x
    other = dataclasses.replace(scene, objects=(dataclasses.replace(RING, x=x, **change), *scene.objects[1:]))
    assert failed(reading_of(other), scene) == wrong


def test_scene_attributes():
    assert failed(reading_of(dataclasses.replace(TWO, background="black")), TWO) == {"background"}
    assert failed(reading_of(dataclasses.replace(TWO, relation="left of")), TWO) == {"relation"}
    swapped = dataclasses.replace(TWO, objects=(SQUARE, RING))
    assert failed(reading_of(swapped), TWO) == {"size", "color", "shape", "motion", "speed", "start", "end"}


def test_missing_and_extra_objects_are_wrong():
    everything_of_objects = {"count", "size", "color", "shape", "motion", "speed", "start", "end"}
    assert failed(reading_of(dataclasses.replace(ONE, background="white")), TWO) == everything_of_objects | {"relation"}
    assert failed(reading_of(dataclasses.replace(TWO, background="gray")), ONE) == everything_of_objects
    assert not any(score(Reading("caption"), TWO).values())


@pytest.mark.slow
def test_caption_and_video_agree_only_on_the_same(video_readings):
    for scene, other, seen in zip(SCENES[:40], SCENES[1:], video_readings, strict=False):
        assert all(agreement(parse_caption(caption_of(scene)), seen).values())
        if scene != other:
            assert not all(agreement(parse_caption(caption_of(other)), seen).values())
    # two empty answers are no agreement
    assert not any(agreement(Reading("caption"), Reading("video", 0)).values())


@pytest.mark.parametrize("source", ["prompt", "caption", "video"])
def test_shuffled_pairs_score_at_chance(source, video_readings):
    readings = video_readings if source == "video" else [reading_of(scene, source) for scene in SCENES]
    right = dict.fromkeys(ATTRIBUTES, 0)
    scored = dict.fromkeys(ATTRIBUTES, 0)
    for shift in range(1, 41):
        for i, scene in enumerate(SCENES):
            for name, value in score(readings[(i + shift) % len(readings)], scene).items():
                right[name] += value
                scored[name] += 1
    chance = chance_levels(source, "val")
    assert set(chance) == {name for name in ATTRIBUTES if scored[name]} | {"mean", "exact"}
    for name, count in scored.items():
        if count:
            # five standard errors; the pairs share scenes, so they count as an eighth of independent ones
            bound = 5 * math.sqrt(chance[name] * (1 - chance[name]) / (count / 8))
            assert bound < chance[name] or name in ("color", "shape", "motion", "start", "end"), name
            assert abs(right[name] / count - chance[name]) <= bound, name
            assert 0.01 < right[name] / count < 0.6, name


def test_chance_levels_follow_from_the_sampler():
    chance = chance_levels("caption", "train", 2000)
    # half of the scenes have one object, so the counts of two scenes agree half of the time
    assert chance["count"] == pytest.approx(0.5, abs=0.03)
    assert chance["background"] == pytest.approx(0.25, abs=0.03)
    # of four pairs of scenes one is (one, one) and one is (two, two)
    assert chance["color"] == pytest.approx((1 / 6 + 1 / 30) / 4, abs=0.02)
    # two objects truly: half of the answers have two as well, half of those the same relation
    assert chance["relation"] == pytest.approx(0.25, abs=0.03)
    assert chance["exact"] < 0.01


def test_text_metric_on_true_shuffled_and_empty_texts():
    for kind, write in (("caption", caption_of), ("prompt", prompt_of)):
        metric = ShapesTextAccuracy(kind)
        metric.update([write(scene).upper() for scene in SCENES], SCENES)
        result = metric.compute()
        assert len(result) == (13 if kind == "caption" else 11)
        assert all(value == 1 for value in result.values())
        metric.reset()
        metric.update([write(scene) for scene in SCENES[1:] + SCENES[:1]], SCENES)
        assert metric.compute()["mean"] < 0.3
        assert metric.compute()["exact_text"] < 0.02
        metric.reset()
        metric.update([""] * len(SCENES), SCENES)
        assert all(value == 0 for value in metric.compute().values())


def test_exact_text_differs_from_exact():
    metric = ShapesTextAccuracy()
    metric.update([caption_of(TWO).replace("the camera does not move, ", "")], [TWO])
    result = metric.compute()
    assert (result["exact"], result["exact_text"]) == (1, 0)


def test_kinds_of_other_data_have_no_mean():
    metric = AttributeAccuracy()
    metric.update([{"None": True}, {"action": False}])
    assert {name: value.item() for name, value in metric.compute().items()} == {"exact": 0.5}


def test_nothing_is_measured_before_any_sample():
    metric = ShapesTextAccuracy()
    metric.update([caption_of(ONE)], [None])
    assert metric.samples == 0
    assert metric.compute() == {}


def test_scenes_may_be_json_or_missing():
    metric = ShapesTextAccuracy()
    metric.update([caption_of(ONE), "a real video", caption_of(ONE)], [ONE.to_dict(), None, TWO])
    assert metric.samples == 2
    assert metric.compute()["exact"] == 0.5


def test_lengths_are_checked():
    with pytest.raises(ValueError):
        ShapesTextAccuracy().update([caption_of(ONE)], [ONE, TWO])


def updates():
    """For each metric, batches of arguments that hold right and wrong answers and unlike numbers of samples."""
    scenes = SCENES[:12]
    shown = scenes[:6] + scenes[7:] + scenes[6:7]
    texts = [caption_of(scene) for scene in shown]
    results = [score(detect(render(scene)), other) for scene, other in zip(scenes, shown, strict=True)]
    parts = [slice(0, 5), slice(5, 6), slice(6, 12)]
    yield ShapesTextAccuracy(), [(texts[part], scenes[part]) for part in parts]
    yield AttributeAccuracy(), [(results[part],) for part in parts]


def test_ranks_add_up_to_one_process():
    for metric, batches in updates():
        single, ranks = copy.deepcopy(metric), [copy.deepcopy(metric) for _ in batches]
        for rank, batch in zip(ranks, batches, strict=True):
            single.update(*batch)
            rank.update(*batch)
        assert 0 < single.compute()["mean"] < 1
        for rank in ranks[1:]:
            ranks[0].merge_state(rank)  # by the declared reductions, as a distributed compute does
        assert ranks[0].compute() == single.compute()
        assert ranks[0].samples == 12


def test_forward_returns_the_batch_and_keeps_the_sum():
    metric = ShapesTextAccuracy("prompt")
    assert metric([prompt_of(ONE)], [ONE])["exact"] == 1
    assert metric([prompt_of(ONE)], [TWO])["exact"] == 0
    assert metric.compute()["exact"] == 0.5
