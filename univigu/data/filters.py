"""Which samples are trained on: the lengths of their texts, counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from univigu.data.sample import TEXT_SUFFIX, SampleError, Texts, parse_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from univigu.data.shards import SampleRef

FilterReason = Literal["prompt_short", "prompt_long", "caption_short", "caption_long"]


@dataclass(frozen=True)
class LengthFilter:
    """Bounds on the texts' lengths in tokens, inclusive at both ends.

    A length is what the foundation's tokenizer makes of the text, its end-of-sequence token counted.  The defaults
    are the paper's (Uni-ViGU, arXiv:2604.08121): a brief prompt against a detailed caption.
    """

    min_prompt: int = 0
    """Fewest tokens of a prompt."""
    max_prompt: int = 128
    """Most tokens of a prompt."""
    min_caption: int = 128
    """Fewest tokens of a caption."""
    max_caption: int = 256
    """Most tokens of a caption."""

    def __post_init__(self) -> None:
        for low, high in (("min_prompt", "max_prompt"), ("min_caption", "max_caption")):
            if getattr(self, low) < 0:
                raise ValueError(f"length_filter.{low}={getattr(self, low)}: expected at least 0")
            if getattr(self, high) < getattr(self, low):
                raise ValueError(
                    f"length_filter.{high}={getattr(self, high)}: expected at least {low}={getattr(self, low)}"
                )

    def reason(self, prompt_tokens: int, caption_tokens: int) -> FilterReason | None:
        """Why a sample with texts of these lengths is dropped, or None if it is kept; the prompt is looked at first."""
        if prompt_tokens < self.min_prompt:
            return "prompt_short"
        if prompt_tokens > self.max_prompt:
            return "prompt_long"
        if caption_tokens < self.min_caption:
            return "caption_short"
        if caption_tokens > self.max_caption:
            return "caption_long"
        return None


@dataclass
class Selection:
    """What is left of a set of samples, and why the rest is not."""

    kept: list[SampleRef]
    counts: Counter[str]
    """Numbers of samples by what became of them: "kept", a filter's reason, or a sample error's reason."""
    errors: list[SampleError]
    """One for every sample that could not be used (filtered ones are not errors)."""
    lengths: dict[str, list[int]]
    """Tokens of the kept samples' prompts and captions."""


def select(
    refs: list[SampleRef],
    tokenizer: PreTrainedTokenizerBase,
    length_filter: LengthFilter,
    prompt_length: int,
    caption_length: int,
    questions: bool = False,
    bucket_of: Callable[[SampleRef], int] = lambda ref: 0,
) -> Selection:
    """Read every sample's json once and keep those that are sound, pass the filter and fit their slots.

    Args:
        refs: samples of the shards, in order.
        tokenizer: counts the tokens.
        length_filter: bounds on the lengths.
        prompt_length, caption_length: slots in tokens.  A text that passes the filter but not its slot is an error
            with reason "text_over_slot": texts are never cut off.
        questions: take each of a sample's questions, with its answer for the caption, instead of its own texts.
            A sample without questions is counted as "no_question".
        bucket_of: which bucket a sample belongs to; its SampleErrors count like all others.
    """
    from univigu.models.tokens import token_count

    selection = Selection([], Counter(), [], {"prompt": [], "caption": []})
    slots = {"prompt": prompt_length, "caption": caption_length}

    def judge(ref: SampleRef, texts: Texts) -> str | None:
        """Why the texts are not trained on, or None, and then they are."""
        lengths = {"prompt": token_count(tokenizer, texts.prompt), "caption": token_count(tokenizer, texts.caption)}
        reason = length_filter.reason(lengths["prompt"], lengths["caption"])
        for name, slot in slots.items():
            if reason is None and lengths[name] > slot:
                value = f"{lengths[name]} tokens, {name}_length={slot}"
                raise SampleError("text_over_slot", ref.shard, ref.key, name, value)
        if reason is None:
            selection.kept.append(replace(ref, tokens=(lengths["prompt"], lengths["caption"])))
            for name, length in lengths.items():
                selection.lengths[name].append(length)
        return reason

    for ref in refs:
        try:
            texts = parse_texts(ref.read(TEXT_SUFFIX), ref.shard, ref.key)
            ref.check_media()
            ref = replace(ref, bucket=bucket_of(ref))
        except SampleError as error:
            selection.errors.append(error)
            selection.counts[error.reason] += 1
            continue
        numbers: list[int | None] = [*range(len(texts.qa or []))] if questions else [None]
        if not numbers:
            selection.counts["no_question"] += 1
        for number in numbers:
            try:
                reason = judge(replace(ref, question=number), texts.question(number))
            except SampleError as error:
                selection.errors.append(error)
                reason = error.reason
            selection.counts[reason or "kept"] += 1
    return selection
