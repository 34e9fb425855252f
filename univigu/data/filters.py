"""Filters samples by the lengths of their texts and counts the others by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from univigu.data.sample import TEXT_SUFFIX, SampleError, Texts, media_suffix, parse_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from univigu.data.index import SampleRef

FilterReason = Literal["prompt_long", "caption_short", "caption_long"]


@dataclass(frozen=True)
class LengthFilter:
    """Bounds on the texts' lengths in tokens, inclusive.

    The foundation's tokenizer counts, end-of-sequence token included.  The defaults are the paper's (Uni-ViGU,
    arXiv:2604.08121): a brief prompt and a detailed caption.
    """

    max_prompt: int = 128
    """Most tokens of a prompt."""
    min_caption: int = 128
    """Fewest tokens of a caption."""
    max_caption: int = 256
    """Most tokens of a caption."""

    def __post_init__(self) -> None:
        for name, least in (("max_prompt", 0), ("min_caption", 0), ("max_caption", self.min_caption)):
            if getattr(self, name) < least:
                bound = f"min_caption={least}" if name == "max_caption" else least
                raise ValueError(f"length_filter.{name}={getattr(self, name)}: expected at least {bound}")

    def reason(self, prompt_tokens: int, caption_tokens: int) -> FilterReason | None:
        """Why a sample with texts of these lengths is dropped, or None if it is kept; the prompt is checked first."""
        if prompt_tokens > self.max_prompt:
            return "prompt_long"
        if caption_tokens < self.min_caption:
            return "caption_short"
        return "caption_long" if caption_tokens > self.max_caption else None


@dataclass
class Selection:
    """The samples of a set that can be used, and counts of the others."""

    kept: list[SampleRef] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Numbers of samples: "kept", and the others by filter reason or error reason."""
    errors: list[SampleError] = field(default_factory=list)
    """One for every sample that cannot be used; filtered samples are not errors."""


def select(
    refs: list[SampleRef],
    tokenizer: PreTrainedTokenizerBase,
    length_filter: LengthFilter,
    prompt_length: int,
    caption_length: int,
    questions: bool = False,
    bucket_of: Callable[[SampleRef], int] = lambda ref: 0,
) -> Selection:
    """Read every sample's json once and keep those that are valid, pass the filter and fit their slots.

    Args:
        prompt_length, caption_length: slots in tokens.  A text that passes the filter but not its slot is an error
            with reason "text_over_slot": texts are never truncated.
        questions: use each question and its answer instead of prompt and caption.  A sample without questions is
            counted as "no_question".
        bucket_of: gives a sample's bucket; its SampleErrors are counted too.
    """
    from univigu.models.tokens import token_count  # not at the top: it loads transformers

    selection = Selection()

    def keep(ref: SampleRef, texts: Texts) -> str:
        """Keep the sample unless it is filtered; returns what it counts as."""
        tokens = token_count(tokenizer, texts.prompt), token_count(tokenizer, texts.caption)
        if reason := length_filter.reason(*tokens):
            return reason
        for name, length, slot in zip(("prompt", "caption"), tokens, (prompt_length, caption_length), strict=True):
            if length > slot:
                raise SampleError("text_over_slot", ref.shard, ref.key, name, f"{length} tokens, {name}_length={slot}")
        selection.kept.append(replace(ref, tokens=tokens))
        return "kept"

    for ref in refs:
        try:
            texts = parse_texts(ref.read(TEXT_SUFFIX), ref.shard, ref.key)
            media_suffix(ref.members, ref.shard, ref.key)
            ref = replace(ref, bucket=bucket_of(ref))
        except SampleError as error:
            selection.errors.append(error)
            selection.counts[error.reason] += 1
            continue
        numbers: list[int | None] = [*range(len(texts.qa or []))] if questions else [None]
        selection.counts["no_question"] += not numbers
        for number in numbers:
            try:
                selection.counts[keep(replace(ref, question=number), texts.question(number))] += 1
            except SampleError as error:
                selection.errors.append(error)
                selection.counts[error.reason] += 1
    selection.counts = +selection.counts  # without zeros
    return selection
