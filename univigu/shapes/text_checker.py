"""Parses the texts of the embedded world, and defines the form in which all readings are compared.

The texts are those of ``texts``, or a model's version of them.  Every attribute is parsed on its own, so a broken
word costs one attribute and not the whole text.  An attribute that a text states twice with different values is None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from univigu.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, SPEEDS
from univigu.shapes.texts import prompt_of

Source = Literal["prompt", "caption", "video"]


@dataclass(frozen=True)
class ObjectReading:
    """What a text or a video shows of one object; None is not stated or contradictory."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None
    motion: str | None = None
    speed: str | None = None
    """One of the world's speeds, or "" for an object that stays still."""
    start: str | None = None
    """The ninth of the frame where the object starts, as ``region_of`` names it; not in prompts."""
    end: str | None = None
    center: tuple[float, float] | None = None
    """Centre (x, y) in canvas pixels in the first frame; only in videos."""


@dataclass(frozen=True)
class Reading:
    """What a text or a video shows; None is not stated or contradictory."""

    source: Source
    count: int | None = None
    background: str | None = None
    relation: str | None = None
    """Of the first object to the second; "" for a single object."""
    objects: tuple[ObjectReading, ...] = ()
    """In the order of the text; in a video the left or upper one first."""
    other_relation: str | None = None
    """A second relation that a video shows just as well (two still objects on a diagonal)."""


_NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _words(values: Iterable[str], after: str = "") -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(values)})\b{after}")


_SIZE, _SHAPE, _SPEED = _words(SIZES), _words(SHAPES), _words(SPEEDS)
# All colour words for objects and background: "a red background" is a wrong statement about the background.
_COLOR = _words([*COLORS, *BACKGROUNDS], r"(?! background\b)")
_BACKGROUND_WORD = _words([*BACKGROUNDS, *COLORS])
_BACKGROUND = re.compile(r"\b((?:\w+ ){1,3})background\b")
# Regions contain "left" and "it still looks large" contains "still", so motions need their verb or adverb.
_MOTION = re.compile(
    rf"\bmov\w* (left|right|up|down)\b|\b(left|right|up|down) (?:{'|'.join(SPEEDS)})\b|\bstay\w* (still)\b"
)
_REGION = re.compile(r"\b((?:upper|middle|lower) (?:left|center|right))\b")
_START = re.compile(r"\bbegins?\b((?:(?!\bends?\b).)*)")
_END = re.compile(r"\bends?\b((?:(?!\bbegins?\b).)*)")
_RELATION = re.compile(
    r"(?:\b(?:the )?(first|second) object (?:is )?)?(?<!upper )(?<!middle )(?<!lower )"
    r"\b(left of|right of|above|below)\b(?: the)?(?: (first|second)\b)?(?: object\b)?"
)
_PROMPT_RELATION = _words(_INVERSE)
_COUNT = _words(_NUMBERS, r" objects?\b")
_HEAD = re.compile(r"\b(first|second)\b|\bthe object\b")
_CAPTION_WORD = re.compile(r"\b(?:objects?|clip|video|frame)\b")


def normalize_text(text: str) -> str:
    """Remove differences that do not count: lower case, single spaces, none before a full stop or comma."""
    return re.sub(r" ([.,])", r"\1", " ".join(text.lower().split()))


def _agreed(mentions: Iterable[Any]) -> Any:
    """The value that all mentions share; None if there is no mention or two differ."""
    values = set(mentions)
    return values.pop() if len(values) == 1 else None


Choice = Callable[[Iterable[Any]], Any]
"""Gives the value of an attribute, of all its mentions in a text."""


def parse_text(text: str, choose: Choice = _agreed) -> Reading:
    """Parse a prompt or a caption; captions contain words that no prompt has ("object", "clip", ...).

    By default an attribute of several values is None; ``choose`` may take one of them instead.
    """
    return (parse_caption if _CAPTION_WORD.search(normalize_text(text)) else parse_prompt)(text, choose)


def brief_of(text: str) -> str:
    """The brief prompt that says the same as a detailed caption; a text that does not state all of it stays.

    Of a text that contradicts itself the first mention counts: a prompt with one wrong word is of more use to a
    generator than a detailed caption that it does not know.
    """
    reading = parse_text(text, lambda mentions: next(iter(mentions), None))
    stated = [reading.background, reading.relation]
    stated += [value for obj in reading.objects for value in (obj.size, obj.color, obj.shape, obj.motion, obj.speed)]
    complete = reading.count == len(reading.objects) > 0 and None not in stated
    return prompt_of(reading) if complete else text  # type: ignore[arg-type]  # it has all that is read of a scene


def parse_prompt(text: str, choose: Choice = _agreed) -> Reading:
    """Parse a brief prompt as ``texts.prompt_of`` writes it, complete or damaged."""
    text = normalize_text(text)
    body = re.sub(r"(?:\bon )?(?:\w+ ){1,3}background\b", ",", text)
    relations = _PROMPT_RELATION.findall(body)
    clauses = _PROMPT_RELATION.sub(",", body).split(",")
    objects = tuple(_object([c], choose) for c in clauses if any(p.search(c) for p in (_SIZE, _COLOR, _SHAPE)))
    relation = "" if not relations and len(objects) == 1 else choose(relations)
    # "..., above" with nothing after it announces an object that it does not name
    count = None if not objects or (relations and len(objects) == 1) else len(objects)
    return Reading("prompt", count, _background(text, choose), relation, objects)


def parse_caption(text: str, choose: Choice = _agreed) -> Reading:
    """Parse a detailed caption as ``texts.caption_of`` writes it, complete or damaged."""
    text = normalize_text(text)
    relations = [_relation_of(match) for match in _RELATION.finditer(text)]
    body = _RELATION.sub(".", text)
    paragraphs = _paragraphs(body)
    two = bool(relations) or "first" in paragraphs or "second" in paragraphs
    counts = [_NUMBERS[word] for word in _COUNT.findall(body)]
    counts += [1 if name == "" else 2 for name in paragraphs] + [2] * len(relations)
    count = choose(counts)
    # Paragraphs of both kinds ("the object" and "the first object"): no count is agreed on, the order stays.
    names = ("first", "second") if two and "" not in paragraphs else tuple(paragraphs)
    objects = tuple(_object(paragraphs.get(name, []), choose) for name in names)
    relation = "" if not relations and count == 1 else choose(relations)
    return Reading("caption", count, _background(text, choose), relation, objects)


def _background(text: str, choose: Choice) -> str | None:
    # the whole noun phrase: "black white background" is a contradiction, too
    return choose(word for phrase in _BACKGROUND.findall(text) for word in _BACKGROUND_WORD.findall(phrase))


def _relation_of(match: re.Match[str]) -> str | None:
    """The relation of the first object to the second that a sentence states; None if it relates one to itself."""
    subject, relation, target = match.groups()
    if subject is not None and subject == target:
        return None
    return _INVERSE[relation] if subject == "second" or target == "first" else relation


def _paragraphs(body: str) -> dict[str, list[str]]:
    """The sentences about each object, by its name in the caption: "first", "second" or "" for a single one."""
    paragraphs: dict[str, list[str]] = {}
    current: str | None = None
    # also split before each head, so that a lost full stop does not join two paragraphs
    for sentence in re.split(rf"[.!?;]|(?={_HEAD.pattern.replace('(', '(?:')})", body):
        head = _HEAD.search(sentence)
        if head is not None:
            current = head.group(1) or ""
        elif re.search(r"\b(?:background|nothing|video)\b", sentence):
            current = None
        if current is not None:
            paragraphs.setdefault(current, []).append(sentence)
    return paragraphs


def _object(sentences: list[str], choose: Choice) -> ObjectReading:
    def find(pattern: re.Pattern[str], within: list[str] = sentences) -> list[str]:
        return [word for sentence in within for word in pattern.findall(sentence)]

    motion = choose("".join(groups) for groups in find(_MOTION))
    speeds = find(_SPEED)
    speed = choose(speeds) if motion != "still" else None if speeds else ""
    size, color, shape = (choose(find(pattern)) for pattern in (_SIZE, _COLOR, _SHAPE))
    start, end = (choose(find(_REGION, find(pattern))) for pattern in (_START, _END))
    return ObjectReading(size, color, shape, motion, speed, start, end)
