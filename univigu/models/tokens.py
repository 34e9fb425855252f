"""Texts as token ids, as in WanPipeline. Quick to import, since every data process imports it."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

import ftfy
import torch
from transformers import PreTrainedTokenizerBase


def clean_text(text: str) -> str:
    """WanPipeline's ``prompt_clean``, whose module takes seconds to import: fixed encoding, no HTML, single blanks."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def replace_words(text: str, words: Mapping[str, str]) -> str:
    """The text with words or phrases replaced, as a whole, in upper or lower case; a ValueError for one not in it."""
    new = {word.lower(): value for word, value in words.items()}
    longest_first = sorted(map(re.escape, new), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)({'|'.join(longest_first)})(?!\w)", re.IGNORECASE)
    found = {match.lower() for match in pattern.findall(text)}
    if missing := [word for word in words if not word.strip() or word.lower() not in found]:
        raise ValueError(f"replace: {missing[0]!r} does not occur in {text!r}")
    return pattern.sub(lambda match: new[match[0].lower()], text)


MAX_CHARACTERS = 2**16
"""Longer texts are not tokenised: they have more tokens than any slot, and a tokenizer takes memory for each."""


class TextTooLongError(ValueError):
    """A text with more tokens than allowed; texts are never cut silently."""


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int, name: str = "prompt") -> torch.Tensor:
    """Token ids int64 [B, length]: text, end of sequence, padding; a TextTooLongError if they do not fit."""
    for text in texts:
        if len(text) > MAX_CHARACTERS:
            raise TextTooLongError(f"{name} has {len(text)} characters, over {MAX_CHARACTERS}: {text[:60]!r}...")
    cleaned = [clean_text(text) for text in texts]
    rows = tokenizer(cleaned, padding="max_length", max_length=length, truncation=False)["input_ids"]
    for text, ids in zip(texts, rows, strict=True):
        if len(ids) > length:
            raise TextTooLongError(f"{name} has {len(ids)} tokens, over the limit of {length}: {text[:60]!r}...")
    return torch.tensor(rows, dtype=torch.int64)


class Vocabulary:
    """The tokenizer's ids that a model knows; its own id of one is the position in that list. None is every id.

    Text encoders take the tokenizer's ids; what a model writes, and is trained to write, are its own.
    """

    def __init__(self, token_ids: Sequence[int] | None) -> None:
        self.kept = None if token_ids is None else torch.tensor(token_ids, dtype=torch.int64)

    def encode(self, tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase, name: str) -> torch.Tensor:
        """The model's ids of the tokenizer's [B, L]; a ValueError names the first text that needs another token."""
        if self.kept is None:
            return tokens
        kept = self.kept.to(tokens.device)
        ids = torch.searchsorted(kept, tokens.contiguous()).clamp(max=len(kept) - 1)
        lacking = (kept[ids] != tokens).nonzero()
        if len(lacking):
            row, column = lacking[0].tolist()
            text, token = detokenize(tokenizer, tokens[row : row + 1])[0], int(tokens[row, column])
            raise ValueError(
                f"{name} {text!r}: token {tokenizer.convert_ids_to_tokens(token)!r} (id {token}) is not in the model's "
                f"vocabulary of {len(kept)} tokens; make one that includes it (tools/convert.py prune)"
            )
        return ids

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """The tokenizer's ids of the model's; any other, such as the mask state, is the tokenizer's unknown one: -1."""
        if self.kept is None:
            return ids
        return torch.cat([self.kept, torch.tensor([-1])]).to(ids.device)[ids.clamp(max=len(self.kept))]


def fit_slot(ids: torch.Tensor, length: int, pad_token_id: int, name: str) -> torch.Tensor:
    """Cut or pad token ids [B, S] to a slot [B, length]; a ValueError if more than padding would be cut."""
    if ids.shape[1] <= length:
        return torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=pad_token_id)
    longest = int((ids != pad_token_id).sum(1).max())
    if longest > length:
        raise ValueError(f"text_length={length}: a {name} of {longest} tokens does not fit the slot")
    return ids[:, :length]


def token_count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Number of tokens of a text, or of its first ``MAX_CHARACTERS``; its end-of-sequence token counts."""
    return len(tokenizer(clean_text(text[:MAX_CHARACTERS]))["input_ids"])


def detokenize(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """Texts of token ids [B, L], each up to its first end-of-sequence token."""
    texts = []
    for row in ids.tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True).strip())
    return texts


def list_prompts(prompt: str | list[str], count: int | None, several: bool) -> list[str]:
    """A list of prompts: one for each of ``count`` videos or, if there may be several, any number for a single one."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("prompt=[]: expected at least one")
    if count is not None and len(prompts) == 1:
        prompts = prompts * count
    if count is not None and count != len(prompts) and (count > 1 or not several):
        raise ValueError(f"prompt: {len(prompts)} of them for {count} videos; give one for all or one for each")
    return prompts
