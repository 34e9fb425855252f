"""Filters samples by the lengths of their texts and counts the others by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from univigu.data.sample import SampleError, SampleRef
from univigu.models.tokens import token_count


@dataclass(frozen=True)
class LengthFilter:
    """Bounds on the texts' lengths in tokens, inclusive; the end-of-sequence token counts.

    The defaults are the paper's (arXiv:2604.08121): a brief prompt and a detailed caption.
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

    def reason(self, prompt_tokens: int, caption_tokens: int) -> str | None:
        """Why a sample with texts of these lengths is dropped, or None if it is kept; the prompt is checked first."""
        if prompt_tokens > self.max_prompt:
            return "prompt_long"
        if caption_tokens < self.min_caption:
            return "caption_short"
        return "caption_long" if caption_tokens > self.max_caption else None


def select(
    refs: list[SampleRef],
    errors: list[SampleError],
    tokenizer: PreTrainedTokenizerBase,
    length_filter: LengthFilter,
    slots: dict[str, int],
    questions: bool = False,
    bucket_of: Callable[[SampleRef], int] = lambda ref: 0,
) -> tuple[list[SampleRef], Counter[str]]:
    """Read every sample's json once and keep those that are valid, pass the filter and fit their slots.

    Args:
        errors: of the samples that could not be indexed; gets one for every sample that cannot be used.
        slots: tokens of "prompt" and "caption".  A longer text is an error: texts are never truncated.
        questions: use each question and its answer instead of prompt and caption.
        bucket_of: gives a sample's bucket or raises a SampleError.

    Returns:
        the samples that are kept, and numbers of samples: "kept", and the others by filter reason or error reason.
    """
    kept, counts = list[SampleRef](), Counter[str]()
    for ref in refs:
        try:
            texts = ref.texts()
            ref = replace(ref, bucket=bucket_of(ref))
            numbers: list[int | None] = [*range(len(texts.qa or []))] if questions else [None]
            counts["no_question"] += not numbers
            for number in numbers:
                pair = texts.question(number)
                lengths = {name: token_count(tokenizer, getattr(pair, name)) for name in slots}
                tokens = lengths["prompt"], lengths["caption"]
                if reason := length_filter.reason(*tokens):
                    counts[reason] += 1
                elif over := next((name for name in slots if lengths[name] > slots[name]), None):
                    value = f"{lengths[over]} tokens, {over}_length={slots[over]}"
                    errors.append(ref.error("text_over_slot", over, value))
                else:
                    kept.append(replace(ref, question=number, tokens=tokens))
        except SampleError as error:
            errors.append(error)
    counts += Counter[str](error.reason for error in errors)  # which drops zeros
    return kept, Counter({"kept": len(kept), **dict(sorted(counts.items()))})
