"""Captions in the form that tarsier's scorer of DREAM-1K reads; it asks a language model and stays outside.

DREAM-1K: Wang et al., 2024, arXiv:2407.00634. docs/EVALUATION.md has the commands. lmms-eval has no such task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from univigu.data.build import Engine
from univigu.data.inputs import find_videos, read_list
from univigu.data.rows import to_line
from univigu.data.sample import DataError, is_video
from univigu.data.synthesis.sources import Pipeline, pipeline_class
from univigu.data.video import VideoError, read_video
from univigu.evaluation.exports import Export, ExportOptions, Row, write_files

FAILED = "<error>"
"""Caption of a clip that cannot be read, as in tarsier's own predictions."""


@dataclass
class CaptionExport(Export):
    """Captions the videos of rows."""

    def run(self, rows: list[Row]) -> list[Mapping[str, bytes]]:
        o, clips = self.options, list[tuple[Row, torch.Tensor]]()
        for row in rows:
            try:
                clips.append((row, read_video(row["video"], o.num_frames, o.height, o.width)))
            except VideoError as error:
                row["error"] = str(error)
        if clips:
            frames, seeds = torch.stack([frames for _, frames in clips]), [row["seed"] for row, _ in clips]
            texts = self.model.captions(frames, seeds, o.question, o.sampling, o.prompt_length)
            for (row, _), text in zip(clips, texts, strict=True):
                row["caption"] = text
        return []


def export_dream1k(
    output: Path,
    model: str,
    videos: str | list[str],
    annotations: str,
    options: ExportOptions,
    engine: Engine = map,
    device: str = "cpu",
) -> list[Row]:
    """Caption the videos, then write captions.jsonl and tarsier's predictions.

    ``tarsier/predictions.jsonl`` has the list's rows with ``text.prediction``.

    Args:
        videos: folder, pattern or list of the clips, named as in the list.
        annotations: tarsier's DREAM-1k.jsonl.

    Returns:
        a row for each video ("key", "video", "caption", "seed", "error").
    """
    if pipeline_class(model, "--model") != "UniViGUPipeline":
        raise DataError(f"--model={model!r}: writes no captions; expected a UniViGUPipeline")
    rows, listed = list[Row](), read_listing(annotations)
    names = [name_of(row) for row in listed]
    for key, path in _locate(names, videos).items():
        error = f"there is no video of the name {key!r}" if path is None else None
        rows.append({"key": key, "video": path, "caption": None, "seed": options.seed + len(rows), "error": error})
    rows = CaptionExport(output, Pipeline(model, options, device, "--model"), options).write(rows, engine)
    by_name, lines = {row["key"]: row["caption"] for row in rows}, []
    for row, name in zip(listed, names, strict=True):
        caption = FAILED if by_name[name] is None else by_name[name]
        lines.append(to_line({**row, "text": {**row["text"], "prediction": caption}}))
    files = {"captions.jsonl": "".join(map(to_line, rows)), "tarsier/predictions.jsonl": "".join(lines)}
    write_files(output, files)
    return rows


def name_of(row: Row) -> str:
    """The name of a row's video, of which tarsier's list gives only the number."""
    return next((str(row[name]) for name in ("vid", "video") if row.get(name) not in (None, "")), "")


def read_listing(path: str) -> list[Row]:
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
