"""Rows of JSON that hold what names, prompts and captions may hold."""

from __future__ import annotations

import json

import pytest

from univigu.data.rows import split_lines, to_json, to_line
from univigu.data.sample import is_unicode

TEXTS = [
    "plain",
    "ä 红 🟥",
    "a\u2028b\u2029c\x85d",
    "new\nline\r\n",
    "half \ud83d",
    "bytes \udc80",
    '\\ " \x00 \x1c',
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_row_is_one_line_to_everyone(text: str) -> None:
    line = to_line({"text": text, text: [text]})
    assert line.endswith("\n") and len(line.splitlines()) == 1 and len(split_lines(line)) == 2
    assert json.loads(line.encode()) == {"text": text, text: [text]}


def test_people_can_read_it() -> None:
    assert to_line({"a": "ä 红 🟥"}) == '{"a": "ä 红 🟥"}\n' and to_json(["ä"], 1) == '[\n "ä"\n]'
    assert to_json("\udc80 ä") == '"\\udc80 \\u00e4"'  # only where it must


def test_lines_end_where_json_says() -> None:
    assert split_lines('"a\u2028b"\r\n"c\x85"\n') == ['"a\u2028b"', '"c\x85"', ""]


@pytest.mark.parametrize("text", TEXTS)
def test_unicode(text: str) -> None:
    assert is_unicode(text) == (not any("\ud800" <= mark <= "\udfff" for mark in text))
