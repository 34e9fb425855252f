"""Reading the embedded world back out of text, and the common form in which all readings are compared.

The texts are those of :func:`univigu.shapes.scenes.prompt_of` and :func:`univigu.shapes.scenes.caption_of`, or what a
half-trained model makes of them.  Every attribute is read by itself, so that a broken word costs one attribute and
not the whole text; an attribute that a text states twice with different values reads as None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from univigu.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, SPEEDS

Source = Literal["prompt", "caption", "video"]
T = TypeVar("T")


@dataclass(frozen=True)
class ObjectReading:
    """What a text or a video shows of one object; None is unread or contradictory."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None
    motion: str | None = None
    speed: str | None = None
    """One of the world's speeds, or "" for an object that stays still."""
    start: str | None = None
    """The ninth of the frame the object is in at first, as ``place_of`` names it; never in a prompt."""
    end: str | None = None
    center: tuple[float, float] | None = None
    """Centre (x, y) in canvas pixels in the first frame; only in a video."""


@dataclass(frozen=True)
class Reading:
    """What a text or a video shows; None is unread or contradictory."""

    source: Source
    count: int | None = None
    background: str | None = None
    relation: str | None = None
    """How the first object lies to the second, one of the world's relations; "" for a single object."""
    objects: tuple[ObjectReading, ...] = ()
    """As the text orders them; in a video the left or upper one first."""
    other_relation: str | None = None
    """A second relation that holds in a video just as well (two still objects on a diagonal)."""


_NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# All colour words in both places: "a red background" is a statement about the background, only a wrong one.
_COLOR = re.compile(rf"\b({'|'.join([*COLORS, *BACKGROUNDS])})\b(?! background\b)")
_SIZE = re.compile(rf"\b({'|'.join(SIZES)})\b")
_SHAPE = re.compile(rf"\b({'|'.join(SHAPES)})\b")
_SPEED = re.compile(rf"\b({'|'.join(SPEEDS)})\b")
# The places contain "left" and "right" and "it still looks large" contains "still": only next to their verb or adverb.
_MOTION = re.compile(
    rf"\bmov\w* (left|right|up|down)\b|\b(left|right|up|down) (?:{'|'.join(SPEEDS)})\b|\bstay\w* (still)\b"
)
_PLACE = re.compile(r"\b((?:upper|middle|lower) (?:left|center|right))\b")
_START = re.compile(r"\bbegins?\b((?:(?!\bends?\b).)*)")
_END = re.compile(r"\bends?\b((?:(?!\bbegins?\b).)*)")
_BACKGROUND = re.compile(r"\b((?:\w+ ){1,3})background\b")
_BACKGROUND_WORD = re.compile(rf"\b({'|'.join([*BACKGROUNDS, *COLORS])})\b")
_RELATION = re.compile(
    r"(?:\b(?:the )?(first|second) object (?:is )?)?(?<!upper )(?<!middle )(?<!lower )"
    r"\b(left of|right of|above|below)\b(?: the)?(?: (first|second)\b)?(?: object\b)?"
)
_PROMPT_RELATION = re.compile(r"\b(left of|right of|above|below)\b")
_COUNT = re.compile(rf"\b({'|'.join(_NUMBERS)}) objects?\b")
_HEAD = re.compile(r"\b(first|second)\b|\bthe object\b")
_CAPTION_WORD = re.compile(r"\b(?:objects?|clip|video|frame)\b")


def normalize_text(text: str) -> str:
    """Lower case, single spaces, none before a full stop or comma: what does not count as a difference of text."""
    return re.sub(r" ([.,])", r"\1", " ".join(text.lower().split()))


def parse_text(text: str) -> Reading:
    """Read a prompt or a caption; captions are told by words that no prompt has ("object", "clip", ...)."""
    return parse_caption(text) if _CAPTION_WORD.search(normalize_text(text)) else parse_prompt(text)


def parse_prompt(text: str) -> Reading:
    """Read a brief prompt as :func:`univigu.shapes.scenes.prompt_of` writes it, whole or damaged."""
    text = normalize_text(text)
    background = _background(text)
    body = re.sub(r"(?:\bon )?(?:\w+ ){1,3}background\b", ",", text)
    relations = _PROMPT_RELATION.findall(body)
    clauses = _PROMPT_RELATION.sub(",", body).split(",")
    objects = tuple(_object([clause]) for clause in clauses if _names_object(clause))
    relation = _agreed(relations)
    if not relations and len(objects) == 1:
        relation = ""
    # "..., above" with nothing behind it announces an object that it does not name
    count = None if not objects or (relations and len(objects) == 1) else len(objects)
    return Reading("prompt", count, background, relation, objects)


def parse_caption(text: str) -> Reading:
    """Read a detailed caption as :func:`univigu.shapes.scenes.caption_of` writes it, whole or damaged."""
    text = normalize_text(text)
    relations = [_relation_of(match) for match in _RELATION.finditer(text)]
    body = _RELATION.sub(".", text)
    paragraphs = _paragraphs(body)
    names: tuple[str, ...] = ("",) if paragraphs else ()
    if relations or "first" in paragraphs or "second" in paragraphs:
        names = ("first", "second")

    counts = [_NUMBERS[word] for word in _COUNT.findall(body)]
    counts += [1 if name == "" else 2 for name in paragraphs]
    counts += [2] * len(relations)
    count = _agreed(counts)
    if "" in paragraphs and names != ("",):  # heads of both kinds: count is None, keep what was said in order
        objects = tuple(_object(chunks) for chunks in paragraphs.values())
    else:
        objects = tuple(_object(paragraphs.get(name, [])) for name in names)
    relation = _agreed(relations)
    if not relations and count == 1:
        relation = ""
    return Reading("caption", count, _background(text), relation, objects)


def _agreed(mentions: Iterable[T | None]) -> T | None:
    """The one value that every mention has; None where there is no mention or two differ."""
    values = set(mentions)
    return values.pop() if len(values) == 1 else None


def _background(text: str) -> str | None:
    # the whole noun phrase: "black white background" is a contradiction, too
    phrases = [match.group(1) for match in _BACKGROUND.finditer(text)]
    return _agreed(word for phrase in phrases for word in _BACKGROUND_WORD.findall(phrase))


def _relation_of(match: re.Match[str]) -> str | None:
    """The relation of the first object to the second that a sentence states; None for one of an object to itself."""
    subject, relation, target = match.groups()
    if subject is not None and subject == target:
        return None
    return _INVERSE[relation] if subject == "second" or target == "first" else relation


def _paragraphs(body: str) -> dict[str, list[str]]:
    """The sentences about each object, by its name in the caption: "first", "second" or "" for the only one."""
    paragraphs: dict[str, list[str]] = {}
    current: str | None = None
    # also before each head, so that a lost full stop does not glue two paragraphs together
    for sentence in re.split(rf"[.!?;]|(?={_HEAD.pattern.replace('(', '(?:')})", body):
        head = _HEAD.search(sentence)
        if head is not None:
            current = head.group(1) or ""
        elif re.search(r"\b(?:background|nothing|video)\b", sentence):
            current = None
        if current is not None:
            paragraphs.setdefault(current, []).append(sentence)
    return paragraphs


def _names_object(clause: str) -> bool:
    return any(pattern.search(clause) for pattern in (_SIZE, _COLOR, _SHAPE))


def _object(sentences: list[str]) -> ObjectReading:
    """Read every attribute of one object from the sentences about it."""

    def read(pattern: re.Pattern[str]) -> str | None:
        return _agreed(word for sentence in sentences for word in pattern.findall(sentence))

    def place(pattern: re.Pattern[str]) -> str | None:
        stretches = [stretch for sentence in sentences for stretch in pattern.findall(sentence)]
        return _agreed(word for stretch in stretches for word in _PLACE.findall(stretch))

    matches = [match for sentence in sentences for match in _MOTION.finditer(sentence)]
    motion = _agreed(next(word for word in match.groups() if word) for match in matches)
    speeds = [word for sentence in sentences for word in _SPEED.findall(sentence)]
    speed = "" if motion == "still" and not speeds else None if motion == "still" else _agreed(speeds)
    return ObjectReading(read(_SIZE), read(_COLOR), read(_SHAPE), motion, speed, place(_START), place(_END))
