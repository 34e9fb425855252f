"""Metrics of the embedded world: exact, because every scene is known."""

from .shapes import (
    ATTRIBUTES,
    ShapesAgreement,
    ShapesTextAccuracy,
    ShapesVideoAccuracy,
    agreement,
    chance_levels,
    reading_of,
    score,
)
from .shapes_text import ObjectReading, Reading, normalize_text, parse_caption, parse_prompt, parse_text
from .shapes_video import detect

__all__ = [
    "ATTRIBUTES",
    "ObjectReading",
    "Reading",
    "ShapesAgreement",
    "ShapesTextAccuracy",
    "ShapesVideoAccuracy",
    "agreement",
    "chance_levels",
    "detect",
    "normalize_text",
    "parse_caption",
    "parse_prompt",
    "parse_text",
    "reading_of",
    "score",
]
