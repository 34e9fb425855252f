"""Captions in the form that tarsier's scorer of DREAM-1K reads; it asks a language model and stays outside.

DREAM-1K: Wang et al., 2024, arXiv:2407.00634. docs/EVALUATION.md has the commands. lmms-eval has no such task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from univigu.data.inputs import find_videos, read_list
from univigu.data.parts import Record
from univigu.data.processes import ONLY, Share
from univigu.data.rows import to_line
from univigu.data.sample import DataError, is_video
from univigu.data.synthesis.sources import pipeline_class
from univigu.data.video import VideoError, read_video
from univigu.evaluation.exports import ExportOptions, export_rows

FAILED = "<error>"
"""Caption of a clip that cannot be read, as in tarsier's own predictions."""


def export_dream1k(
    output: Path,
    model: str,
    videos: str | list[str],
    annotations: str,
    options: ExportOptions,
    share: Share = ONLY,
    device: str = "cpu",
) -> list[Record] | None:
    """Caption this process's share of the videos; the last process writes captions.jsonl and tarsier's predictions.

    ``tarsier/predictions.jsonl`` has the list's rows with ``text.prediction``.

    Args:
        videos: folder, pattern or list of the clips, named as in the list.
        annotations: tarsier's DREAM-1k.jsonl.

    Returns:
        a row for each video ("key", "video", "caption", "seed", "error"), or None while other processes have some left.
    """
    if pipeline_class(model, "--model") != "UniViGUPipeline":
        raise DataError(f"--model={model!r}: writes no captions; expected a UniViGUPipeline")
    o, rows = options, list[Record]()
    listed = read_listing(annotations)
    names = [name_of(row) for row in listed]
    for key, path in _locate(names, videos).items():
        error = f"there is no video of the name {key!r}" if path is None else None
        rows.append({"key": key, "video": path, "caption": None, "seed": o.seed + len(rows), "error": error})

    def run(pipeline: Callable[[], Any], batch: list[Record]) -> list[Mapping[str, bytes]]:
        clips = []
        for row in batch:
            try:
                clips.append((row, read_video(row["video"], o.num_frames, o.height, o.width)))
            except VideoError as error:
                row["error"] = str(error)
        if clips:
            captions = pipeline().caption(
                torch.stack([frames for _, frames in clips]).float() / 255,
                o.question or None,
                generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row, _ in clips],
                options=o.sampling,
                max_sequence_length=o.prompt_length,
            )
            for (row, _), text in zip(clips, captions.text, strict=True):
                row["caption"] = text
        return [{} for _ in batch]

    def merge(rows: list[Record]) -> Mapping[str, str]:
        by_name = {row["key"]: row["caption"] for row in rows}
        lines = []
        for row, name in zip(listed, names, strict=True):
            caption = FAILED if by_name[name] is None else by_name[name]
            lines.append(to_line({**row, "text": {**row["text"], "prediction": caption}}))
        return {"captions.jsonl": "".join(map(to_line, rows)), "tarsier/predictions.jsonl": "".join(lines)}

    return export_rows(output, model, rows, options, run, merge, share, device)


def name_of(row: Record) -> str:
    """The name of a row's video, of which tarsier's list gives only the number."""
    return next((str(row[name]) for name in ("vid", "video") if row.get(name) not in (None, "")), "")


def read_listing(path: str) -> list[Record]:
    """Rows of tarsier's list; one that names no video or has no object "text" is a DataError."""
    rows = read_list(path, "--annotations")
    for row in rows:
        if row.error or not name_of(row.fields) or not isinstance(row.fields.get("text"), dict):
            expected = f'{row.where}: expected "vid", a video\'s name, and an object "text", as tarsier\'s'
            raise DataError(f"--annotations={path!r}: {row.error or expected}")
    return [row.fields for row in rows]


def _locate(names: list[str], videos: str | list[str]) -> dict[str, str | None]:
    """The videos' files: of the given name, or of that name and any video suffix; None where there is none."""
    files: dict[str, str] = {}
    for path in find_videos(videos):
        files.setdefault(Path(path).name.lower(), path)
        if is_video(Path(path)):
            files.setdefault(Path(path).stem.lower(), path)
    return {name: files.get(Path(name).name.lower()) for name in dict.fromkeys(names)}
