"""The text checkers: right on every true text, honest (None, not a guess) on damaged ones."""

from __future__ import annotations

import dataclasses

import pytest

from univigu.shapes.metrics import reading_of
from univigu.shapes.scenes import Object, Scene, sample_scene
from univigu.shapes.text_checker import Reading, brief_of, normalize_text, parse_caption, parse_prompt, parse_text
from univigu.shapes.texts import caption_of, prompt_of

SEEDS = range(150)
RING = Object("small", "red", "ring", "right", "quickly", 12.0, 12.0)
SQUARE = Object("large", "blue", "square", "still", "", 30.0, 45.0)
ONE = Scene((RING,), "gray", "")
TWO = Scene((RING, SQUARE), "white", "above")


def wrong(reading: Reading, truth: Reading) -> list[str]:
    """The false statements of a reading; None and missing objects state nothing."""
    bad = [n for n in ("count", "background", "relation") if getattr(reading, n) not in (None, getattr(truth, n))]
    for i, (ours, true) in enumerate(zip(reading.objects, truth.objects, strict=False)):
        for field in dataclasses.fields(true):
            if getattr(ours, field.name) not in (None, getattr(true, field.name)):
                bad.append(f"{i}.{field.name}")
    return bad


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_true_texts_read_back_exactly(split):
    for seed in SEEDS:
        scene = sample_scene(seed, split)
        assert parse_text(prompt_of(scene)) == parse_prompt(prompt_of(scene)) == reading_of(scene, "prompt")
        assert parse_text(caption_of(scene)) == parse_caption(caption_of(scene)) == reading_of(scene, "caption")


def test_case_and_spacing_do_not_matter():
    text = caption_of(TWO).upper().replace(".", " . ").replace(" ", "\n ")
    assert normalize_text(text) == caption_of(TWO)
    assert parse_caption(text) == reading_of(TWO)


@pytest.mark.parametrize("text", ["", " . ,", "the the object", "red", "object", "is left of", "\x00\uffff", "a, a"])
def test_nothing_to_read_is_not_an_error(text):
    for parse in (parse_text, parse_prompt, parse_caption):
        reading = parse(text)
        assert reading.background is None
        assert all(obj.shape is None for obj in reading.objects)


@pytest.mark.parametrize("seed", range(4))
def test_truncated_captions_state_nothing_false(seed):
    scene = sample_scene(seed)
    text, truth = caption_of(scene), reading_of(scene)
    for length in range(len(text)):
        assert wrong(parse_caption(text[:length]), truth) == [], text[:length]


@pytest.mark.parametrize("seed", range(4))
def test_truncated_prompts_state_nothing_false_of_the_objects(seed):
    scene = sample_scene(seed)
    text, truth = prompt_of(scene), reading_of(scene, "prompt")
    for length in range(len(text)):
        bad = wrong(parse_prompt(text[:length]), truth)
        assert set(bad) <= {"count", "relation"}, text[:length]  # a second object may have been cut off whole


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("write", [caption_of, prompt_of])
def test_lost_and_doubled_words_cost_little(seed, write):
    scene = sample_scene(seed)
    words, truth = write(scene).split(), reading_of(scene, "caption" if write is caption_of else "prompt")
    parse = parse_caption if write is caption_of else parse_prompt
    fields = ("size", "color", "shape", "motion", "start", "end")
    for i in range(len(words)):
        lost = parse(" ".join(words[:i] + words[i + 1 :]))
        assert [name for name in wrong(lost, truth) if name != "count"] == [], words[i]
        pairs = list(zip(lost.objects, truth.objects, strict=False))
        unread = sum(getattr(ours, field) != getattr(true, field) for ours, true in pairs for field in fields)
        assert unread <= 1 or "first" in words[i] or "second" in words[i] or "object" in words[i], words[i]
        doubled = parse(" ".join(words[: i + 1] + words[i:]))
        assert wrong(doubled, truth) == [], words[i]


def test_lost_full_stops_lose_nothing():
    assert parse_caption(caption_of(TWO).replace(".", "")).objects == reading_of(TWO).objects
    assert parse_caption(caption_of(TWO).replace(".", "")).relation == "above"


@pytest.mark.parametrize(
    ("old", "new", "attribute"),
    [
        ("small red", "large red", "size"),
        ("still looks small", "still looks large", "size"),
        ("small red", "small blue", "color"),
        ("an even red", "an even yellow", "color"),
        ("an even red", "an even gray", "color"),
        ("red ring", "red cross", "shape"),
        ("that of a ring", "that of a square", "shape"),
        ("moves right quickly", "moves right quickly. it moves left quickly", "motion"),
        ("moves right quickly", "moves right quickly slowly", "speed"),
        ("begins it is in the upper left", "begins it is in the upper left upper center", "start"),
        ("ends it is in the upper right", "ends it is in the lower left upper right", "end"),
    ],
)
def test_contradiction_about_an_object_reads_as_none(old, new, attribute):
    text = caption_of(ONE)
    assert old in text
    reading = parse_caption(text.replace(old, new, 1))
    truth = reading_of(ONE)
    assert getattr(reading.objects[0], attribute) is None
    expected = dataclasses.replace(truth, objects=(dataclasses.replace(truth.objects[0], **{attribute: None}),))
    assert reading == expected  # and it costs that attribute only


@pytest.mark.parametrize(
    ("old", "new", "attribute"),
    [
        ("plain white", "plain black", "background"),
        ("the white background", "the gray background", "background"),
        ("plain white", "plain red", "background"),
        ("plain white", "black white", "background"),
        ("shows two objects", "shows one object", "count"),
        ("shows two objects", "shows three objects", "count"),
        ("for the whole clip", "and left of it for the whole clip", "relation"),
        ("is above the second", "is above the first", "relation"),
    ],
)
def test_contradiction_about_the_scene_reads_as_none(old, new, attribute):
    text = caption_of(TWO)
    assert old in text
    reading = parse_caption(text.replace(old, new, 1))
    assert getattr(reading, attribute) is None
    assert dataclasses.replace(reading, **{attribute: getattr(reading_of(TWO), attribute)}) == reading_of(TWO)


def test_inverted_relation_is_not_the_relation():
    text = caption_of(TWO).replace("the first object is above the second", "the second object is above the first")
    assert parse_caption(text).relation == "below"


def test_wrong_words_are_read_as_said():
    assert parse_caption(caption_of(ONE).replace("gray", "purple")).background == "purple"
    assert parse_caption(caption_of(ONE).replace("red", "white")).objects[0].color == "white"
    assert parse_prompt(prompt_of(ONE).replace("ring", "triangle")).objects[0].shape == "triangle"


def test_unknown_words_are_unread():
    reading = parse_prompt("a tiny orange blob moving around fast, on a pink background")
    assert reading == Reading("prompt")
    reading = parse_prompt("a small orange ring moving up, on a gray background")
    assert (reading.count, reading.background, reading.relation) == (1, "gray", "")
    ring = reading.objects[0]
    assert (ring.size, ring.color, ring.shape, ring.motion, ring.speed) == ("small", None, "ring", "up", None)


def test_broken_prompts():
    whole = reading_of(TWO, "prompt")
    assert parse_prompt(prompt_of(TWO).replace(",", "")) == whole
    assert parse_prompt(prompt_of(TWO).replace(" a ", " ")) == whole
    both = parse_prompt(prompt_of(TWO).replace("above", "above left of"))
    assert (both.count, both.relation, both.objects) == (2, None, whole.objects)
    assert parse_prompt(prompt_of(TWO).replace("above ", "")).relation is None
    assert parse_prompt("a small red ring moving right quickly, above").count is None
    assert parse_prompt("a red ring staying still moving up quickly, on a gray background").objects[0].motion is None


def test_a_caption_gives_its_brief_prompt() -> None:
    for seed in range(100):
        scene = sample_scene(seed)
        assert brief_of(caption_of(scene)) == brief_of(prompt_of(scene)) == prompt_of(scene)
    broken = caption_of(sample_scene(0)).replace("background", "wall")
    assert brief_of(broken) == broken and brief_of("a cat jumps.") == "a cat jumps."


def test_of_a_contradiction_the_brief_prompt_has_the_first_statement() -> None:
    text, prompt = caption_of(TWO), prompt_of(TWO)
    for true, false in (("that of a ring", "that of a cross"), ("still looks large", "still looks small")):
        contradictory = text.replace(true, false)
        assert contradictory != text and parse_caption(contradictory) != reading_of(TWO)
        assert brief_of(contradictory) == prompt
    late = text.replace("the white background keeps", "the black background keeps")
    assert late != text and parse_caption(late).background is None and brief_of(late) == prompt
    early = text.replace("is a small red ring", "is a small red cross")
    assert early != text and brief_of(early) == prompt.replace("ring", "cross")
