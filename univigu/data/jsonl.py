"""Rows of JSON, one a line, that survive whatever names, prompts and captions hold."""

from __future__ import annotations

import json
from typing import Any

LINE_ENDS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
"""What some readers take for a line's end, though JSON does not; inside of its strings it may be escaped."""


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that people can read, in UTF-8; escaped where a file's name holds bytes that are no text."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text if is_unicode(text) else json.dumps(value, indent=indent)


def to_line(row: Any) -> str:
    """A row with its line's end; nothing inside of it is a line's end to anyone."""
    return to_json(row).translate(LINE_ENDS) + "\n"


def is_unicode(text: str) -> bool:
    """Whether a string is text: JSON may hold halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def split_lines(text: str) -> list[str]:
    """Lines as JSON and people know them; ``str.splitlines`` would also part a row at marks inside of its strings."""
    return text.replace("\r\n", "\n").split("\n")
