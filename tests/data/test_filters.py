from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.damage import write_raw
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.options import LengthFilter
from univigu.models.tokens import token_count


def test_bounds_are_inclusive() -> None:
    length = LengthFilter(max_prompt=4, min_caption=6, max_caption=8)
    assert [length.reason(n, 7) for n in range(6)] == [None] * 5 + ["prompt_long"]
    assert [length.reason(3, n) for n in range(5, 10)] == ["caption_short", None, None, None, "caption_long"]
    assert LengthFilter().reason(128, 128) is None and LengthFilter().reason(0, 256) is None
    assert LengthFilter().reason(129, 128) == "prompt_long" and LengthFilter().reason(0, 127) == "caption_short"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"min_caption": -1}, "min_caption=-1"), ({"max_caption": 5}, "max_caption=5: expected at least 128")],
)
def test_impossible_bounds_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthFilter(**options)


def test_samples_are_counted_by_reason(tmp_path: Path, foundation: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(f"{foundation}/tokenizer")
    assert token_count(tokenizer, "a red circle") == token_count(tokenizer, "") + 3  # the end-of-sequence token counts
    assert token_count(tokenizer, "") == 1
    words = {"fits": (3, 5), "long": (9, 5), "short": (3, 1), "slot": (3, 7), "odd": (3, 6)}
    samples = [("broken", {"mp4": b"x", "json": b"{"})]
    for key, (prompt, caption) in words.items():
        texts = {"prompt": " ".join(["red"] * prompt), "caption": " ".join(["blue"] * caption)}
        samples.append((key, {"mp4": b"x", "json": json.dumps(texts).encode()}))
    write_raw(tmp_path / "train" / "a.tar", samples)
    length = LengthFilter(max_prompt=8, min_caption=5, max_caption=8)
    slots = {"prompt_length": 8, "caption_length": 7, "length_filter": length}
    data = VideoTextDataModule(foundation, shards=str(tmp_path), precompute=False, **slots)
    kept = data._select("train")
    assert [ref.key for ref in kept] == ["fits", "odd"]
    reasons = ("prompt_long", "caption_short", "text_over_slot", "corrupt_json")
    assert data.filter_counts["train"] == {"kept": 2, **dict.fromkeys(reasons, 1)}
    assert sorted(seen[1:] for seen in data.errors.seen) == [("broken", "corrupt_json"), ("slot", "text_over_slot")]
    assert "8 tokens, caption_length=7" in caplog.text
