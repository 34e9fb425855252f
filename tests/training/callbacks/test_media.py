"""The table of captions in TensorBoard: one row for each clip, whatever the texts contain."""

from __future__ import annotations

import re
from html import unescape

from tensorboard.plugin_util import markdown_to_safe_html

from univigu.training.callbacks.media import caption_table

KEYS = ["0", "a|b"]
TRUTH = ["One paragraph.\n\nAnother one.\n", "left | right"]
CAPTIONS = ["Windows\r\nlines\u2028and others", "| a table |\n|---|---|"]
ROWS = [
    ["0", "One paragraph. Another one.", "Windows lines and others"],
    ["a|b", "left | right", "| a table | |---|---|"],
]


def cells(page: str, mark: str = "td") -> list[list[str]]:
    """The rows of a page's tables, as a browser shows them."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.S)
    return [[unescape(cell) for cell in re.findall(rf"<{mark}[^>]*>(.*?)</{mark}>", row, re.S)] for row in rows]


def test_tensorboard_shows_a_row_for_each_clip() -> None:
    page = markdown_to_safe_html(caption_table(KEYS, TRUTH, CAPTIONS))
    assert cells(page)[1:] == ROWS and cells(page, "th")[0] == ["clip", "truth", "model"]


def test_ordinary_texts_stay_as_they_are() -> None:
    table = caption_table(["7"], ["a red ring, staying still"], ["A red ring is shown."])
    assert table.splitlines()[2:] == ["| 7 | a red ring, staying still | A red ring is shown. |"]
