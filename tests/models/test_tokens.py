"""Words in texts."""

from __future__ import annotations

import pytest

from univigu.models.tokens import replace_words


def test_words_are_replaced_as_a_whole_and_at_once() -> None:
    text = "A red circle, left of a blue square; red, not reddish."
    assert (
        replace_words(text, {"red": "blue", "BLUE": "red"}) == "A blue circle, left of a red square; blue, not reddish."
    )
    assert replace_words(text, {"red circle": "small ring", "red": "green"}) == (
        "A small ring, left of a blue square; green, not reddish."
    )
    assert replace_words("a c++ (1) b", {"c++": r"\1", "(1)": "2"}) == r"a \1 2 b"


@pytest.mark.parametrize("word", ["reddis", "green", "", " "])
def test_a_word_that_does_not_occur_is_named(word: str) -> None:
    with pytest.raises(ValueError, match="does not occur in 'a red,  reddish ring'"):
        replace_words("a red,  reddish ring", {"red": "blue", word: "x"})
