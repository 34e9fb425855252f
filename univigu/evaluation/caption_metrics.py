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
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.functional.text import bleu_score
from torchmetrics.utilities import dim_zero_cat

Tokens = Sequence[str]

_ABBREVIATIONS = "mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|fig|inc|co|corp|ltd|approx"
_SPLIT = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta", "gimme": "gim me"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}  # what coco-caption drops
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
        if token in _PUNCTUATION or token == '"' or set(token) <= {"."} or set(token) == {"-"}:
            continue
        tokens += _SPLIT.get(token, _BRACKETS.get(token, token)).split()
    return tokens


def _ngrams(tokens: Tokens, size: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


def rouge_l(tokens: Tokens, references: Sequence[Tokens], beta: float = 1.2) -> float:
    """ROUGE-L of one caption in [0, 1], Lin (2004), as in coco-caption: (1 + beta^2) P R / (R + beta^2 P).

    P and R are the longest common subsequence's share of the caption's and of a reference's tokens, each the maximum
    over the references.
    """
    common = [_common_subsequence(tokens, reference) for reference in references]
    precision = max(common) / max(len(tokens), 1)
    recall = max(c / max(len(reference), 1) for c, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _common_subsequence(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for j, other in enumerate(second, 1):
            above = row[j]
            row[j] = diagonal + 1 if token == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def cider(pairs: Sequence[tuple[Tokens, Sequence[Tokens]]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of each caption, in [0, 10] (papers print its mean times 100), Vedantam et al., arXiv:1411.5726.

    Captions and references become vectors g_n of their n-grams' counts, n = 1..4, weighted by log(N / df), where df is
    the number of the N samples in whose references an n-gram occurs.  The score is 10 times the mean over n and
    references of exp(-(l_c - l_r)^2 / (2 sigma^2)) * min(g_c, g_r) . g_r / (|g_c| |g_r|), l the number of bigrams.

    Args:
        pairs: (caption, its references) of the whole corpus, tokenised.  With one sample all weights are 0.
        sigma: tolerance for differences of length.
    """
    samples = [{gram for text in texts for n in range(1, 5) for gram in _ngrams(text, n)} for _, texts in pairs]
    frequency = Counter(gram for grams in samples for gram in grams)
    log_samples = math.log(max(len(pairs), 1))

    def vector(tokens: Tokens, size: int) -> dict[tuple[str, ...], float]:
        counts = Counter(_ngrams(tokens, size))
        return {gram: count * (log_samples - math.log(max(1, frequency[gram]))) for gram, count in counts.items()}

    def similarity(caption: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
        common = ((value, reference[gram]) for gram, value in caption.items() if gram in reference)
        norms = math.hypot(*caption.values()) * math.hypot(*reference.values())
        return sum(min(value, true) * true for value, true in common) / norms if norms else 0.0

    scores = []
    for caption, references in pairs:
        total, own = 0.0, [vector(caption, n) for n in range(1, 5)]
        for reference in references:
            difference = max(len(caption) - 1, 0) - max(len(reference) - 1, 0)
            cosine = sum(similarity(grams, vector(reference, n)) for n, grams in enumerate(own, 1))
            total += math.exp(-(difference**2) / (2 * sigma**2)) * cosine
        scores.append(10.0 * total / (4 * len(references)))
    return scores


def bleu_4(pairs: Sequence[tuple[Tokens, Sequence[Tokens]]]) -> float:
    """Corpus BLEU-4 in [0, 1]; if no 4-gram at all is right it is 0, where coco-caption gives 1e-4 or less."""
    # Of two references equally near in length coco-caption takes the shorter, torchmetrics the first.
    references = [[" ".join(text) for text in sorted(texts, key=len)] for _, texts in pairs]
    return float(bleu_score([" ".join(caption) for caption, _ in pairs], references, n_gram=4))


class CaptionScores(Metric):
    """Scores of captions against references, and statistics that show a collapse to a few sentences.

    * ``bleu4``, ``rouge_l``, ``cider``: ``bleu_4()``, the means of ``rouge_l()`` and ``cider()``.
    * ``words``, ``words_truth``: mean length of the captions and of the references in tokens.
    * ``repetition``: mean share of a caption's 4-grams that repeat earlier ones (arXiv:1908.04319).
    * ``distinct_1``, ``distinct_2``: different words (pairs) divided by all words (pairs) (arXiv:1510.03055).
    * ``unique``: share of different captions.
    """

    is_differentiable, full_state_update = False, False
    texts: list[torch.Tensor]
    """uint8, because ranks exchange tensors: a line per sample, texts separated by tabs, tokens by spaces."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("texts", [], dist_reduce_fx="cat")

    def update(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add a batch of captions, each with its references."""
        samples = [[caption, *texts] for caption, texts in zip(captions, references, strict=True)]
        lines = ["\t".join(" ".join(tokenize_caption(text)) for text in texts) + "\n" for texts in samples]
        if lines:
            data = bytearray("".join(lines).encode())
            self.texts.append(torch.frombuffer(data, dtype=torch.uint8).to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Exchange texts between ranks."""
        if not self.texts:  # torchmetrics would send an empty float tensor to ranks that expect bytes
            self.texts = [torch.zeros(0, dtype=torch.uint8, device=self.device)]
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, torch.Tensor]:
        data = bytes(dim_zero_cat(self.texts).cpu().numpy()).decode() if len(self.texts) else ""
        samples = [[text.split() for text in line.split("\t")] for line in data.split("\n")[:-1]]
        pairs = [(texts[0], texts[1:]) for texts in samples]
        captions = [caption for caption, _ in pairs]
        values = {
            "bleu4": bleu_4(pairs) if pairs else 0.0,
            "rouge_l": _mean(rouge_l(caption, references) for caption, references in pairs),
            "cider": _mean(cider(pairs)),
            "words": _mean(map(len, captions)),
            "words_truth": _mean(len(reference) for _, references in pairs for reference in references),
            "repetition": _mean(1 - _distinct([caption], 4) if len(caption) >= 4 else 0.0 for caption in captions),
            "distinct_1": _distinct(captions, 1),
            "distinct_2": _distinct(captions, 2),
            "unique": len(set(map(tuple, captions))) / max(len(captions), 1),
        }
        return {name: torch.tensor(value, device=self.device) for name, value in values.items()}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / max(len(values), 1)


def _distinct(captions: Iterable[Tokens], size: int) -> float:
    """Number of different n-grams of the captions divided by the number of all."""
    grams = [gram for tokens in captions for gram in _ngrams(tokens, size)]
    return len(set(grams)) / max(len(grams), 1)
