"""Bounds on the lengths of texts."""

from __future__ import annotations

from dataclasses import dataclass

from univigu.data.options import check_least


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
        check_least(self, "length_filter.", max_prompt=0, min_caption=0, max_caption=self.min_caption)

    def reason(self, prompt_tokens: int, caption_tokens: int) -> str | None:
        """Why a sample with texts of these lengths is dropped, or None if it is kept; the prompt is checked first."""
        if prompt_tokens > self.max_prompt:
            return "prompt_long"
        if caption_tokens < self.min_caption:
            return "caption_short"
        return "caption_long" if caption_tokens > self.max_caption else None
