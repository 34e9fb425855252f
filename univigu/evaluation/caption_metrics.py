"""Caption scores as papers report them: coco-caption's BLEU-4, ROUGE-L and CIDEr.

coco-caption (Chen et al., 2015, arXiv:1504.00325) is what captions of MSR-VTT, VATEX and ActivityNet are scored with;
its Python 3 edition is ``pycocoevalcap``.  Other libraries define the same names differently: here ROUGE-L weighs
recall (beta 1.2, rouge-score has 1), BLEU sums over the corpus, CIDEr is CIDEr-D times 10, and tokens are those of
Stanford's PTBTokenizer.  ``tests/evaluation/caption_pairs.json`` holds coco-caption's own figures; ours equal them to
1e-4.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

import torch
from torch import nn
from torchmetrics.functional.text import bleu_score

from univigu.data.loader import of_all_ranks

Tokens = Sequence[str]

_ABBREVIATIONS = "mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|fig|inc|co|corp|ltd|approx"
_SPLIT = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta", "gimme": "gim me"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PUNCTUATION = {"''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"}  # what coco-caption drops
_UNICODE = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})
_TOKEN = re.compile(
    rf"""
    https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+           # addresses
    | (?:[^\W\d_]\.)+(?=[^\w]|$)                          # a.m., U.S., a single letter with its dot
    | (?:{_ABBREVIATIONS})\.                               # Mr.
    | [#@]\w+                                             # tags, names
    | \d+(?:[.,:/]\d+)+ | \.\d+(?!\w)                     # 3.5  1,000  12:30  1/2
    | \w+(?:[-/.&]\w+)+(?:'\w+)?                          # cross-country, and/or, left.Right
    | \w*\w(?=n't\b) | n't\b                              # do n't
    | o'clock\b | '(?:n|em|tis|twas)\b(?!')'? | '\d0s\b   # words that begin or are made with an apostrophe
    | '(?:s|m|d|re|ve|ll)\b                               # it 's
    | \w+                                                 # a word or number
    | \.{{2,}} | -{{2,}} | [!?]+ | [^\w\s]                # the rest, mark by mark
    """,
    re.VERBOSE,
)


def tokenize_caption(text: str) -> list[str]:
    """Lower-case words as coco-caption counts them: Penn Treebank tokens without most punctuation.

    This follows Stanford's PTBTokenizer (3.4.1, ``-lowerCase``) for contractions, hyphens, numbers, brackets, common
    abbreviations, tags and addresses; emoticons, rare abbreviations and markup may be split differently.
    """
    tokens: list[str] = []
    for token in _TOKEN.findall(text.translate(_UNICODE).lower()):
        if token not in _PUNCTUATION and set(token) != {"."} and set(token) != {"-"}:
            tokens += _SPLIT.get(token, _BRACKETS.get(token, token)).split()
    return tokens


def _ngrams(tokens: Tokens, size: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


def rouge_l(tokens: Tokens, reference: Tokens, beta: float = 1.2) -> float:
    """ROUGE-L of one caption in [0, 1], Lin (2004), as in coco-caption: (1 + beta^2) P R / (R + beta^2 P).

    P and R are the longest common subsequence's share of the caption's and of the reference's tokens.
    """
    common = [0] * (len(reference) + 1)  # with the reference's first j tokens
    for token in tokens:
        diagonal = 0
        for j, other in enumerate(reference, 1):
            above = common[j]
            common[j] = diagonal + 1 if token == other else max(above, common[j - 1])
            diagonal = above
    if not common[-1]:
        return 0.0
    precision, recall = common[-1] / len(tokens), common[-1] / len(reference)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def cider(pairs: Sequence[tuple[Tokens, Tokens]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of each caption, in [0, 10] (papers print its mean times 100), Vedantam et al., arXiv:1411.5726.

    Captions and references become vectors g_n of their n-grams' counts, n = 1..4, weighted by log(N / df), where df is
    the number of the N references in which an n-gram occurs.  The score is 10 times the mean over n of
    exp(-(l_c - l_r)^2 / (2 sigma^2)) * min(g_c, g_r) . g_r / (|g_c| |g_r|), l the number of bigrams.

    Args:
        pairs: (caption, its reference) of the whole corpus, tokenised.  With one sample all weights are 0.
        sigma: tolerance for differences of length.
    """
    frequency = Counter(gram for _, text in pairs for n in range(1, 5) for gram in set(_ngrams(text, n)))
    log_samples = math.log(len(pairs))

    def vector(tokens: Tokens, size: int) -> dict[tuple[str, ...], float]:
        counts = Counter(_ngrams(tokens, size))
        return {gram: count * (log_samples - math.log(max(1, frequency[gram]))) for gram, count in counts.items()}

    def similarity(caption: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
        common = ((value, reference[gram]) for gram, value in caption.items() if gram in reference)
        norms = math.hypot(*caption.values()) * math.hypot(*reference.values())
        return sum(min(value, true) * true for value, true in common) / norms if norms else 0.0

    scores = []
    for caption, reference in pairs:
        difference = max(len(caption) - 1, 0) - max(len(reference) - 1, 0)
        cosine = sum(similarity(vector(caption, n), vector(reference, n)) for n in range(1, 5))
        scores.append(10.0 * math.exp(-(difference**2) / (2 * sigma**2)) * cosine / 4)
    return scores


class CaptionScores(nn.Module):
    """Scores of captions against references, and statistics that show a collapse to a few sentences.

    * ``bleu4``: corpus BLEU-4 in [0, 1]; if no 4-gram at all is right it is 0, where coco-caption gives 1e-4 or less.
    * ``rouge_l``, ``cider``: the means of ``rouge_l()`` and ``cider()``.
    * ``words``, ``words_truth``: mean length of the captions and of the references in tokens.
    * ``repetition``: mean share of a caption's 4-grams that repeat earlier ones (arXiv:1908.04319).
    * ``distinct_1``, ``distinct_2``: different words (pairs) divided by all words (pairs) (arXiv:1510.03055).
    * ``unique``: share of different captions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tokens, Tokens]] = []

    def update(self, captions: Sequence[str], references: Sequence[str]) -> None:
        """Add a batch of captions, each with its reference."""
        self.pairs += zip(map(tokenize_caption, captions), map(tokenize_caption, references), strict=True)

    def compute(self) -> dict[str, torch.Tensor]:
        """The scores of all ranks' captions."""
        pairs = [pair for part in of_all_ranks(self.pairs) for pair in part]
        captions, references = [caption for caption, _ in pairs], [reference for _, reference in pairs]
        bleu = bleu_score([" ".join(text) for text in captions], [[" ".join(text)] for text in references], n_gram=4)
        values = {
            "bleu4": float(bleu),
            "rouge_l": fmean(rouge_l(*pair) for pair in pairs),
            "cider": fmean(cider(pairs)),
            "words": fmean(map(len, captions)),
            "words_truth": fmean(map(len, references)),
            "repetition": fmean(1 - _distinct([caption], 4) if len(caption) >= 4 else 0.0 for caption in captions),
            "distinct_1": _distinct(captions, 1),
            "distinct_2": _distinct(captions, 2),
            "unique": len(set(map(tuple, captions))) / len(captions),
        }
        return {name: torch.tensor(value) for name, value in values.items()}


def _distinct(captions: Iterable[Tokens], size: int) -> float:
    """Number of different n-grams of the captions divided by the number of all."""
    grams = [gram for tokens in captions for gram in _ngrams(tokens, size)]
    return len(set(grams)) / max(len(grams), 1)
