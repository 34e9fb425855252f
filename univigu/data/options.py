"""Dataclasses of options whose fields become options of a command, and checks that they share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_args, get_type_hints

import docstring_parser
import torch

Options = TypeVar("Options")
DTYPES = ("float32", "bfloat16", "float16")


def add_options(parser: Any, options: Any) -> None:
    """Add ``--field-name`` to a parser for each number or text of a dataclass, with its default and description."""
    parsed = [docstring_parser.parse_from_object(kind) for kind in reversed(type(options).__mro__[:-1])]
    descriptions = {item.arg_name: item.description or "" for doc in parsed for item in doc.params}
    for name, kind in get_type_hints(type(options)).items():
        kind = next((arg for arg in get_args(kind) if arg is not type(None)), kind)
        if kind in (int, float, str):
            text = descriptions.get(name, "").replace("%", "%%")
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(options, name), help=text)


def read_options(kind: type[Options], namespace: argparse.Namespace) -> Options:
    """The dataclass of parsed options; fields that are no options have their defaults."""
    given = {field.name: getattr(namespace, field.name) for field in fields(kind) if hasattr(namespace, field.name)}  # type: ignore[arg-type]
    return kind(**given)


def check_least(options: Any, group: str = "", **least: float) -> None:
    """Raise ValueError for a field, of a group of options, that is below its least value."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise ValueError(f"{group}{name}={value}: expected at least {bound}")


def check_dtype(name: str, option: str = "dtype") -> torch.dtype:
    """The torch dtype of that name; raises ValueError for one that models do not run in."""
    if name not in DTYPES:
        raise ValueError(f"{option}={name!r}: expected one of {DTYPES}")
    return getattr(torch, name)


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
