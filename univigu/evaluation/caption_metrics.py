"""Scores of captions against references, as papers report them: coco-caption's BLEU-4, ROUGE-L and CIDEr.

THE reference is coco-caption (Chen et al., 2015, arXiv:1504.00325), which MSR-VTT's, VATEX's and ActivityNet's captions
are scored by, and whose Python 3 edition is ``pycocoevalcap``.  Its definitions differ from those of other libraries of
the same names: ROUGE-L weighs recall (beta 1.2, rouge-score has 1), BLEU sums over the corpus, CIDEr is CIDEr-D times
10.  ``tests/evaluation/caption_pairs.json`` holds figures made with it and its Java tokenizer; ours equal them to 1e-4.

Texts are tokenised here in pure Python.  Every score is a ``torchmetrics.Metric``: the ranks of a run together come to
what one process would have.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.text import BLEUScore
from torchmetrics.utilities import dim_zero_cat

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

    It follows Stanford's PTBTokenizer (3.4.1, ``-lowerCase``) in contractions, hyphens, numbers, brackets, common
    abbreviations, tags and addresses; rare things (emoticons, long abbreviations, markup) may be cut otherwise.
    """
    tokens: list[str] = []
    for token in _TOKEN.findall(text.translate(_UNICODE).lower()):
        if token in _PUNCTUATION or token == '"' or set(token) <= {"."} or set(token) == {"-"}:
            continue
        tokens += _SPLIT.get(token, _BRACKETS.get(token, token)).split()
    return tokens


# ------------------------------------------------------------------------- scores of pairs


def ngrams(tokens: Sequence[str], longest: int = 4) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to ``longest`` tokens occurs."""
    sizes = range(1, longest + 1)
    return Counter(tuple(tokens[i : i + n]) for n in sizes for i in range(len(tokens) - n + 1))


def rouge_l(tokens: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2) -> float:
    """ROUGE-L of one caption in [0, 1], Lin (2004), as coco-caption has it.

    With P and R the longest common subsequence's share of the caption's and of a reference's tokens, each the best
    over the references: (1 + beta^2) P R / (R + beta^2 P).
    """
    common = [_common_subsequence(tokens, reference) for reference in references]
    precision = max(common) / max(len(tokens), 1)
    recall = max(c / max(len(reference), 1) for c, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for j, other in enumerate(second, 1):
            above = row[j]
            row[j] = diagonal + 1 if token == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def cider(pairs: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of each caption, in [0, 10] (papers print its mean times 100), Vedantam et al., arXiv:1411.5726.

    Captions and references become vectors g_n of their n-grams' counts, n = 1..4, weighed by log(N / df), where df is
    in how many of the N samples' references an n-gram occurs.  The score is 10 times the mean over n and references of
    exp(-(l_c - l_r)^2 / (2 sigma^2)) * min(g_c, g_r) . g_r / (|g_c| |g_r|), l being lengths in tokens less one.

    Args:
        pairs: (caption, its references) of the whole corpus, tokenised.  With one sample all weights are 0.
        sigma: tolerated difference of lengths.
    """
    counts = [(ngrams(tokens), [ngrams(reference) for reference in references]) for tokens, references in pairs]
    frequency = Counter(gram for _, references in counts for gram in set().union(*references))
    samples = math.log(max(len(pairs), 1))

    def vectors(grams: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        parts: list[dict[tuple[str, ...], float]] = [{}, {}, {}, {}]
        for gram, count in grams.items():
            parts[len(gram) - 1][gram] = count * (samples - math.log(max(1, frequency[gram])))
        norms = [math.sqrt(sum(v * v for v in part.values())) for part in parts]
        return parts, norms, sum(count for gram, count in grams.items() if len(gram) == 2)

    scores = []
    for caption, references in counts:
        own, own_norms, own_length = vectors(caption)
        total = 0.0
        for reference in references:
            other, other_norms, other_length = vectors(reference)
            penalty = math.exp(-((own_length - other_length) ** 2) / (2 * sigma**2))
            for a, b, norm_a, norm_b in zip(own, other, own_norms, other_norms, strict=True):
                product = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
                total += penalty * product / (norm_a * norm_b) if norm_a and norm_b else 0.0
        scores.append(10.0 * total / (4 * len(references)))
    return scores


# ------------------------------------------------------------------------- metrics


class CaptionBLEU(BLEUScore):
    """Corpus BLEU-4 in [0, 1] by coco-caption's tokens: torchmetrics', whose sums add up over ranks.

    Where no 4-gram at all is right it is 0; coco-caption then gives some 1e-4 or less.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(n_gram=4, **kwargs)

    def update(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add a batch: a caption and its references each."""
        spaced = [[" ".join(tokenize_caption(text)) for text in texts] for texts in references]
        # Of two references equally near in length coco-caption takes the shorter, torchmetrics the first.
        spaced = [sorted(texts, key=lambda text: len(text.split())) for texts in spaced]
        super().update([" ".join(tokenize_caption(caption)) for caption in captions], spaced)


class CaptionROUGE(Metric):
    """Mean :func:`rouge_l` in [0, 1]."""

    is_differentiable, higher_is_better, full_state_update = False, True, False
    total: torch.Tensor
    samples: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add a batch: a caption and its references each."""
        for caption, texts in zip(captions, references, strict=True):
            self.total += rouge_l(tokenize_caption(caption), [tokenize_caption(text) for text in texts])
            self.samples += 1

    def compute(self) -> torch.Tensor:
        return (self.total / self.samples.clamp_min(1)).float()


class _Corpus(Metric):
    """Keeps tokenised texts, for scores that are no sum over samples; as bytes, because ranks exchange tensors."""

    is_differentiable, full_state_update = False, False
    texts: list[torch.Tensor]
    """uint8: a line a sample, its texts between tabs, tokens between spaces (none of which tokens contain)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("texts", [], dist_reduce_fx="cat")

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        if not self.texts:  # torchmetrics would send an empty tensor of floats to ranks that expect bytes
            self.texts = [torch.zeros(0, dtype=torch.uint8, device=self.device)]
        super()._sync_dist(*args, **kwargs)

    def _keep(self, samples: Iterable[Sequence[str]]) -> None:
        lines = ["\t".join(" ".join(tokenize_caption(text)) for text in texts) + "\n" for texts in samples]
        data = bytearray("".join(lines).encode())
        if data:
            self.texts.append(torch.frombuffer(data, dtype=torch.uint8).to(self.device))

    def _kept(self) -> list[list[list[str]]]:
        """Samples, their texts, their tokens."""
        if not len(self.texts):
            return []
        data = bytes(dim_zero_cat(self.texts).to(torch.uint8).cpu().numpy()).decode()
        return [[text.split() for text in line.split("\t")] for line in data.split("\n")[:-1]]


class CaptionCIDEr(_Corpus):
    """Mean :func:`cider` over the corpus, in [0, 10]."""

    higher_is_better = True

    def update(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add a batch: a caption and its references each."""
        self._keep([caption, *texts] for caption, texts in zip(captions, references, strict=True))

    def compute(self) -> torch.Tensor:
        scores = cider([(texts[0], texts[1:]) for texts in self._kept()])
        return torch.tensor(math.fsum(scores) / max(len(scores), 1), device=self.device)


class CaptionStatistics(_Corpus):
    """How long, repetitive and diverse captions are; what models that collapse to one sentence fail.

    words         mean length in tokens
    words_truth   the references'
    repetition    mean share of a caption's 4-grams that it has had before (Welleck et al., 2019, arXiv:1908.04319)
    distinct_1/2  different words (pairs) a word (pair) of all captions (Li et al., 2016, arXiv:1510.03055)
    unique        share of the captions that differ from all before them
    """

    def update(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add a batch: a caption and its references each."""
        self._keep([caption, *texts] for caption, texts in zip(captions, references, strict=True))

    def compute(self) -> dict[str, torch.Tensor]:
        samples = self._kept()
        captions = [texts[0] for texts in samples]
        truth = [tokens for texts in samples for tokens in texts[1:]]
        values = {
            "words": _mean(len(tokens) for tokens in captions),
            "words_truth": _mean(len(tokens) for tokens in truth),
            "repetition": _mean(_repeated(tokens) for tokens in captions),
            "distinct_1": _distinct(captions, 1),
            "distinct_2": _distinct(captions, 2),
            "unique": len({tuple(tokens) for tokens in captions}) / max(len(captions), 1),
        }
        return {name: torch.tensor(value, device=self.device) for name, value in values.items()}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / max(len(values), 1)


def _repeated(tokens: Sequence[str], size: int = 4) -> float:
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _distinct(captions: Iterable[Sequence[str]], size: int) -> float:
    grams = [tuple(tokens[i : i + size]) for tokens in captions for i in range(len(tokens) - size + 1)]
    return len(set(grams)) / max(len(grams), 1)


def caption_metrics() -> MetricCollection:
    """All of them: ``update(captions, references)``, ``compute`` gives bleu4, rouge_l, cider, words, ... by name."""
    return MetricCollection(
        {
            "bleu4": CaptionBLEU(),
            "rouge_l": CaptionROUGE(),
            "cider": CaptionCIDEr(),
            "statistics": CaptionStatistics(),
        },
        compute_groups=False,  # comparing states to find equal ones would compare texts that are still empty
    )
