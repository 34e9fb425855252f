"""Rows of JSON that hold what names, prompts and captions may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from univigu.data.rows import MAX_FIELD, read_rows, to_json, to_line
from univigu.data.sample import DataError, is_unicode

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
    assert line.endswith("\n") and len(line.splitlines()) == 1 and line.count("\n") == 1
    assert json.loads(line.encode()) == {"text": text, text: [text]}


def test_people_can_read_it() -> None:
    assert to_line({"a": "ä 红 🟥"}) == '{"a": "ä 红 🟥"}\n' and to_json(["ä"], 1) == '[\n "ä"\n]'
    assert to_json("\udc80 ä") == '"\\udc80 \\u00e4"'  # only where it must


def test_lines_end_where_json_says(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("a\u2028b\r\n\r\nc\x85d\n".encode())
    assert [(row.where, row.fields["prompt"]) for row in read_rows(path)] == [
        (f"{path}:1", "a\u2028b"),
        (f"{path}:3", "c\x85d"),
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_unicode(text: str) -> None:
    assert is_unicode(text) == (not any("\ud800" <= mark <= "\udfff" for mark in text))


def rows_of(tmp_path: Path, name: str, content: str) -> list[tuple[dict[str, Any], str | None]]:
    (tmp_path / name).write_text(content)
    return [(row.fields, row.error and row.error.removeprefix(f"{tmp_path}/")) for row in read_rows(tmp_path / name)]


def test_tables_of_all_kinds_hold_the_same(tmp_path: Path) -> None:
    expected = [{"prompt": "a, b", "n": ""}, {"prompt": 'say "x"', "n": "2"}]
    found = rows_of(tmp_path, "t.CSV", '\n"prompt",n\n\n"a, b",\n"say ""x""",2\n')
    assert found == [(row, None) for row in expected]
    assert rows_of(tmp_path, "t.json", json.dumps(expected)) == found
    assert rows_of(tmp_path, "t.jsonl", "\n".join(map(json.dumps, expected))) == found
    assert rows_of(tmp_path, "s.json", '["a", 3]') == [
        ({"prompt": "a"}, None),
        ({}, "s.json:2: expected an object, got 3"),
    ]


def test_one_column_needs_no_quotes(tmp_path: Path) -> None:
    found = rows_of(tmp_path, "t.csv", 'prompt\na ring, red\n\n"a, b"\n')
    assert found == [({"prompt": "a ring, red"}, None), ({"prompt": "a, b"}, None)]


def test_broken_tables_name_the_line(tmp_path: Path) -> None:
    found = rows_of(tmp_path, "t.csv", 'a,b\n1,2\n\n1\n"x\ny",2\n1,2,3\n')
    assert [error for _, error in found] == [
        None,
        "t.csv:4: 1 fields, the header has 2",
        None,
        "t.csv:7: 3 fields, the header has 2",
    ]
    assert found[2][0] == {"a": "x\ny", "b": "2"}
    for content, line in (
        ('a,b\n1,2\n1,"open\n1,2\n1,2\n', 3),  # to the end of the file
        ('a,b\n1,"open\n1,"closed",2\n', 2),  # to the next quote
        (f'a,b\n1,2\n1,2\n1,"{"x" * MAX_FIELD}y"\n', 4),
    ):
        with pytest.raises(DataError, match=rf"t\.csv:{line}: a quote is not closed, or a field is too long"):
            rows_of(tmp_path, "t.csv", content)
    for name, content in (("t.json", "{"), ("t.json", '{"a": 1}'), ("t.json", "[" * 100_000), ("t.xml", "")):
        with pytest.raises(DataError, match=rf"{name}: (cannot be read|expected a)"):
            rows_of(tmp_path, name, content)
