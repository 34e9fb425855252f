"""Caption scores equal coco-caption's own figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from univigu.evaluation.caption_metrics import CaptionScores, cider, rouge_l, tokenize_caption

DATA = json.loads((Path(__file__).with_name("caption_pairs.json")).read_text())
CAPTIONS = [pair["caption"] for pair in DATA["pairs"]]
REFERENCES = [pair["reference"] for pair in DATA["pairs"]]
TOKENS = [tuple(text.split() for text in pair["tokens"]) for pair in DATA["pairs"]]


def results(captions: list[str], references: list[str]) -> dict[str, float]:
    metrics = CaptionScores()
    for start in range(0, len(captions), 7):  # in batches, the last one shorter
        metrics.update(captions[start : start + 7], references[start : start + 7])
    return {name: float(value) for name, value in metrics.compute().items()}


def test_the_corpus_scores_are_the_references() -> None:
    assert len(CAPTIONS) == 50
    ours = results(CAPTIONS, REFERENCES)
    for name in ("bleu4", "rouge_l", "cider"):
        assert ours[name] == pytest.approx(DATA[name], abs=1e-4), name


def test_tokens_are_the_java_tokenizers() -> None:
    for pair in DATA["pairs"]:
        for text, tokens in zip([pair["caption"], pair["reference"]], pair["tokens"], strict=True):
            assert tokenize_caption(text) == tokens.split(), text


def test_each_caption_scores_as_with_the_reference() -> None:
    for pair, score, (caption, reference) in zip(DATA["pairs"], cider(TOKENS), TOKENS, strict=True):
        assert score == pytest.approx(pair["cider"], abs=1e-6)
        assert rouge_l(caption, reference) == pytest.approx(pair["rouge_l"], abs=1e-6)


@pytest.mark.parametrize("change", ["beta", "sigma", "punctuation"])
def test_other_definitions_give_other_figures(change: str) -> None:
    """Negative control: rouge-score's beta, plain CIDEr's missing penalty, and tokens with punctuation."""
    if change == "punctuation":
        pairs = [(pair["caption"].lower().split(), pair["reference"].lower().split()) for pair in DATA["pairs"]]
        assert abs(sum(cider(pairs)) / 50 - DATA["cider"]) > 1e-3
    elif change == "beta":
        assert abs(sum(rouge_l(*pair, beta=1.0) for pair in TOKENS) / 50 - DATA["rouge_l"]) > 1e-3
    else:
        assert abs(sum(cider(TOKENS, sigma=1e6)) / 50 - DATA["cider"]) > 1e-3


def test_statistics_by_hand() -> None:
    ours = results(["an ox an ox an ox", "cat dog", "Cat dog."], ["an ox ran", "xy", "xy yz"])
    assert ours["words"] == pytest.approx(10 / 3) and ours["words_truth"] == pytest.approx(2)
    assert ours["repetition"] == pytest.approx((1 / 3 + 0 + 0) / 3)  # of its three 4-grams the last repeats the first
    assert ours["distinct_1"] == pytest.approx(4 / 10) and ours["distinct_2"] == pytest.approx(3 / 7)
    assert ours["unique"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("caption", ["", "...", "\n\t", "word"])
def test_captions_without_words_and_single_samples_score_nothing(caption: str) -> None:
    ours = results([caption], ["a cat sits on a mat"])
    assert ours["bleu4"] == ours["rouge_l"] == ours["cider"] == 0.0
    assert all(torch.tensor(value).isfinite() for value in ours.values())
