"""What ``lightning predict`` reads: video files to caption, or prompts to generate from; one row an input."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from univigu.data.jsonl import is_unicode, split_lines
from univigu.data.sample import VIDEO_SUFFIXES, DataError, is_video
from univigu.data.video import VideoError, read_video
from univigu.models.tokens import TextTooLongError, tokenize


def find_videos(value: str | list[str]) -> list[str]:
    """Paths of the videos that a file, a folder, a glob pattern, or a list of these names.

    Those of one folder or pattern are sorted; a list keeps its order; a path that occurs twice is read once.
    Files that are named outright may have any suffix, folders are searched for video suffixes.

    Raises:
        DataError: a value names nothing.
    """
    values = [value] if isinstance(value, str) else value
    if not values:
        raise DataError("data.videos=[]: expected at least one file, folder or pattern")
    paths: dict[str, None] = {}
    for item in values:
        path = Path(item)
        if path.is_dir():
            found = [str(p) for p in sorted(path.iterdir()) if is_video(p) and p.is_file()]
            if not found:
                raise DataError(f"data.videos={item!r}: the folder holds no {', '.join(VIDEO_SUFFIXES)} file")
        elif path.is_file():
            found = [item]
        else:
            found = sorted(name for name in glob.glob(item, recursive=True) if Path(name).is_file())
            if not found:
                raise DataError(f"data.videos={item!r}: no such file or folder, and nothing matches it as a pattern")
        paths.update(dict.fromkeys(found))
    return list(paths)


def read_prompts(value: str | list[str], name: str = "data.prompts") -> list[tuple[str, str | None]]:
    """(prompt, error) of each prompt of a .txt file (one a line), a .jsonl or .parquet file ("prompt"), or a list.

    Any other string is itself a prompt.  Blank lines are passed over; a row that is not what a .jsonl or .parquet
    file should hold comes through as an error.

    Args:
        value: see above.
        name: the option that errors are reported under.

    Raises:
        DataError: the file is missing or not of its kind, or there is no prompt at all.
    """
    if isinstance(value, list):
        rows: list[tuple[str, str | None]] = [(prompt, None) for prompt in value]
    elif value.endswith(".parquet"):
        rows = _parquet_prompts(value, name)
    elif value.endswith((".txt", ".jsonl")):
        try:
            lines = split_lines(Path(value).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name}={value!r}: cannot be read ({error})") from error
        numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        if value.endswith(".txt"):
            rows = [(line, None) for _, line in numbered]
        else:
            rows = [_json_prompt(line, f"{value}:{number}") for number, line in numbered]
    else:
        rows = [(value, None)]
    if not rows:
        raise DataError(f"{name}={value!r}: holds no prompt")
    return [
        (prompt, error or (None if is_unicode(prompt) else f"no valid Unicode: {prompt!r}")) for prompt, error in rows
    ]


def _json_prompt(line: str, where: str) -> tuple[str, str | None]:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        return "", f"{where}: not JSON ({error})"
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        return "", f'{where}: expected an object with a string "prompt", got {line[:80]}'
    return data["prompt"], None


def _parquet_prompts(path: str, name: str) -> list[tuple[str, str | None]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{name}={path!r}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        values = pyarrow.parquet.read_table(path, columns=["prompt"])["prompt"].to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f'{name}={path!r}: no parquet file with a column "prompt" ({error})') from error
    wrong = 'row {} of {}: expected a string "prompt", got {!r}'
    return [(v, None) if isinstance(v, str) else ("", wrong.format(i, path, v)) for i, v in enumerate(values, 1)]


class VideoInputs(Dataset[dict[str, Any]]):
    """Videos to caption; one that cannot be read gives a row with an error.

    Args:
        paths: the files.
        num_frames, height, width: size that the videos are brought to.
    """

    def __init__(self, paths: list[str], num_frames: int, height: int, width: int) -> None:
        self.paths = paths
        self.size = (num_frames, height, width)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"index": index, "path": self.paths[index], "video": None, "error": None}
        try:
            row["video"] = read_video(row["path"], *self.size)
        except VideoError as error:
            row["error"] = str(error)
        return row

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """``index``, ``path``, ``ok``, ``error`` of all rows; ``video`` uint8 [n, F, C, H, W] of the n good ones."""
        num_frames, height, width = self.size
        videos = [row["video"] for row in rows if row["error"] is None]
        return {
            "index": [row["index"] for row in rows],
            "path": [row["path"] for row in rows],
            "video": torch.stack(videos) if videos else torch.zeros(0, num_frames, 3, height, width, dtype=torch.uint8),
            "ok": [row["error"] is None for row in rows],
            "error": [row["error"] for row in rows],
        }


class PromptInputs(Dataset[dict[str, Any]]):
    """Prompts to generate from; one that does not fit its slot gives a row with an error.

    Args:
        prompts: (prompt, error) pairs of :func:`read_prompts`.
        tokenizer: of the foundation.
        prompt_length: slot in tokens.
    """

    def __init__(
        self, prompts: list[tuple[str, str | None]], tokenizer: PreTrainedTokenizerBase, prompt_length: int
    ) -> None:
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, error = self.prompts[index]
        row: dict[str, Any] = {"index": index, "prompt": prompt, "ids": None, "error": error}
        if error is None:
            try:
                row["ids"] = tokenize(self.tokenizer, [prompt], self.prompt_length)[0]
            except TextTooLongError as too_long:
                row["error"] = str(too_long)
        return row

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """``index``, ``prompt``, ``ok``, ``error`` of all rows; ``prompt_ids`` int64 [n, L] of the n good ones."""
        ids = [row["ids"] for row in rows if row["error"] is None]
        return {
            "index": [row["index"] for row in rows],
            "prompt": [row["prompt"] for row in rows],
            "prompt_ids": torch.stack(ids) if ids else torch.zeros(0, self.prompt_length, dtype=torch.int64),
            "ok": [row["error"] is None for row in rows],
            "error": [row["error"] for row in rows],
        }
