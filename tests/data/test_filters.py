from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from univigu.data.filters import LengthFilter, select
from univigu.data.index import scan_shard
from univigu.models.tokens import token_count


def test_bounds_are_inclusive() -> None:
    length = LengthFilter(max_prompt=4, min_caption=6, max_caption=8)
    assert [length.reason(n, 7) for n in range(6)] == [None] * 5 + ["prompt_long"]
    assert [length.reason(3, n) for n in range(5, 10)] == ["caption_short", None, None, None, "caption_long"]
    assert LengthFilter().reason(128, 128) is None and LengthFilter().reason(0, 256) is None
    assert LengthFilter().reason(129, 128) == "prompt_long" and LengthFilter().reason(0, 127) == "caption_short"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"min_caption": -1}, "min_caption=-1"), ({"max_caption": 5}, "max_caption=5: expected at least min_caption=128")],
)
def test_impossible_bounds_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthFilter(**options)


def test_samples_are_counted_by_reason(tmp_path: Path, foundation: str, raw_tar: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(f"{foundation}/tokenizer")
    assert token_count(tokenizer, "a red circle") == token_count(tokenizer, "") + 3  # the end-of-sequence token counts
    assert token_count(tokenizer, "") == 1
    words = {"fits": (3, 5), "long": (9, 5), "short": (3, 1), "slot": (3, 7), "odd": (3, 6)}
    members = []
    for key, (prompt, caption) in words.items():
        texts = {"prompt": " ".join(["red"] * prompt), "caption": " ".join(["blue"] * caption)}
        members += [(f"{key}.mp4", b"x"), (f"{key}.json", json.dumps(texts).encode())]
    refs, errors = scan_shard(raw_tar(tmp_path / "a.tar", [*members, ("broken.mp4", b"x"), ("broken.json", b"{")]))
    assert len(refs) == 6 and not errors
    length = LengthFilter(max_prompt=8, min_caption=5, max_caption=8)
    selection = select(refs, tokenizer, length, {"prompt": 8, "caption": 7})
    assert [ref.key for ref in selection.kept] == ["fits", "odd"]
    assert selection.counts == {
        "kept": 2,
        "prompt_long": 1,
        "caption_short": 1,
        "text_over_slot": 1,
        "corrupt_json": 1,
    }
    assert [(error.key, error.reason) for error in selection.errors] == [
        ("slot", "text_over_slot"),
        ("broken", "corrupt_json"),
    ]
    assert "8 tokens, caption_length=7" in str(selection.errors[0])
