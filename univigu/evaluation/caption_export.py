"""Captions in the forms that the scorers of DREAM-1K and VDC read; these ask language models and stay outside.

DREAM-1K (Wang et al., 2024, arXiv:2407.00634) is scored by tarsier's ``evaluation.evaluate``, VDC (Chai et al., 2024,
arXiv:2410.03051) by aurora's ``post_eval`` or by lmms-eval. docs/EVALUATION.md has the commands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from univigu.data.inputs import find_videos, read_list
from univigu.data.parts import Record
from univigu.data.processes import ONLY, Share
from univigu.data.rows import to_json, to_line
from univigu.data.sample import DataError, is_video
from univigu.data.synthesis.sources import pipeline_class
from univigu.data.video import VideoError, read_video
from univigu.evaluation.exports import ExportOptions, export_rows

Benchmark = Literal["dream1k", "vdc"]
Category = Literal["short", "background", "main_object", "camera", "detailed"]
NAME_FIELDS = {"dream1k": ("vid", "video"), "vdc": ("video_name", "video_id", "video")}
"""Fields with the name of a row's video."""
FAILED = "<error>"
"""Caption of a clip that cannot be read, as in tarsier's own predictions."""


def export_captions(
    output: Path,
    model: str,
    benchmark: Benchmark,
    videos: str | list[str],
    annotations: str | None,
    options: ExportOptions,
    category: Category = "detailed",
    share: Share = ONLY,
    device: str = "cpu",
) -> list[Record] | None:
    """Caption this process's share of the videos; the last process writes captions.jsonl and the benchmark's files.

    ``dream1k`` with tarsier's DREAM-1k.jsonl gives ``tarsier/predictions.jsonl``: the list's rows with
    ``text.prediction``.  ``vdc`` gives ``aurora/{category}.json`` for aurora's post_eval and, for a list in lmms-eval's
    order, ``lmms-eval/vdc_{category}.json`` for its model ``from_log``.

    Args:
        videos: folder, pattern or list of the clips, named as in the list of ``annotations``.
        annotations: the benchmark's list; without one VDC's clips are those of ``videos``, named by their ids.

    Returns:
        a row for each video ("key", "video", "caption", "seed", "error"), or None while other processes have some left.
    """
    if pipeline_class(model, "--model") != "UniViGUPipeline":
        raise DataError(f"--model={model!r}: writes no captions; expected a UniViGUPipeline")
    o, rows = options, list[Record]()
    listed, names = _read_list(benchmark, videos, annotations)
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
        captions, files = [by_name[name] for name in names], {"captions.jsonl": "".join(map(to_line, rows))}
        if benchmark == "dream1k":
            lines = [
                to_line({**row, "text": {**row["text"], "prediction": FAILED if caption is None else caption}})
                for row, caption in zip(listed, captions, strict=True)
            ]
            files["tarsier/predictions.jsonl"] = "".join(lines)
        else:
            records = [
                {"doc_id": i, "doc": {"video_id": Path(name).stem, "video_name": name}, "resps": [[caption or ""]]}
                for i, (name, caption) in enumerate(zip(names, captions, strict=True))
            ]
            files[f"aurora/{category}.json"] = to_json(records, 1) + "\n"
            if annotations is not None:
                name = f"vdc_{category}"
                arguments = {"model": "univigu", "model_args": f"pretrained={model}", "limit": None}
                log = {"args": arguments, "model_configs": {"task": name}, "time": "0101_0000", "logs": records}
                files[f"lmms-eval/{name}.json"] = to_json(log, 1) + "\n"
        return files

    return export_rows(output, model, rows, options, run, merge, share, device)


def _read_list(
    benchmark: Benchmark, videos: str | list[str], annotations: str | None
) -> tuple[list[Record], list[str]]:
    """Rows of the benchmark's list and the names of their videos."""
    if annotations is None:
        names = [Path(path).stem for path in find_videos(videos)]
        if twice := sorted(name for name, count in Counter(names).items() if count > 1):
            raise DataError(f"--videos: two files are called {twice[0]!r}; an id must be one video's")
        return [{} for _ in names], names
    rows, names = read_listing(annotations, NAME_FIELDS[benchmark], "--annotations")
    if benchmark == "dream1k" and not all(isinstance(row.get("text"), dict) for row in rows):
        raise DataError(f'--annotations={annotations!r}: expected rows with an object "text", as tarsier\'s')
    return rows, names


def read_listing(path: str, fields: tuple[str, ...], option: str) -> tuple[list[Record], list[str]]:
    """Rows of a benchmark's list, and the text of each that names its video: of the first of the fields that it has.

    Rows of aurora's list are ``{name: questions}``.
    """
    rows, names = read_list(path, option), []
    for row in rows:
        only = next(iter(row.fields.items())) if len(row.fields) == 1 else ("", None)
        name = next((row.fields[field] for field in fields if row.fields.get(field) not in (None, "")), None)
        if name is None and not isinstance(only[1], list):
            error = row.error or f"{row.where} has none of the fields {list(fields)}"
            raise DataError(f"{option}={path!r}: {error}")
        names.append(only[0] if name is None else str(name))
    return [row.fields for row in rows], names


def _locate(names: list[str], videos: str | list[str]) -> dict[str, str | None]:
    """The videos' files: of the given name, or of that name and any video suffix; None where there is none."""
    files: dict[str, str] = {}
    for path in find_videos(videos):
        files.setdefault(Path(path).name.lower(), path)
        if is_video(Path(path)):
            files.setdefault(Path(path).stem.lower(), path)
    return {name: files.get(Path(name).name.lower()) for name in dict.fromkeys(names)}
