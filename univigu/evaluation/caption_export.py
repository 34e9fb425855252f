"""Captions in the forms that the scorers of DREAM-1K and VDC read; these ask language models and stay outside.

DREAM-1K (Wang et al., 2024, arXiv:2407.00634) is scored by tarsier's ``evaluation.evaluate`` or by VLMEvalKit,
VDC (Chai et al., 2024, arXiv:2410.03051) by aurora's ``post_eval``, by lmms-eval or by VLMEvalKit.
docs/EVALUATION.md has the commands.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from univigu.data.inputs import find_videos
from univigu.data.options import check_dtype, check_least
from univigu.data.parts import Record
from univigu.data.processes import ONLY, Share
from univigu.data.rows import split_lines, to_json, to_line
from univigu.data.sample import DataError, is_video
from univigu.data.synthesis.sources import pipeline_class
from univigu.data.video import VideoError, read_video
from univigu.evaluation.exports import Pipeline, export_rows
from univigu.sampling.options import SamplingOptions

Category = Literal["short", "background", "main_object", "camera", "detailed"]
FAILED = "<error>"
"""Caption of a clip that cannot be read, as in tarsier's own predictions."""
Captions = Mapping[str, str | None]
"""By the benchmark's name of the video; None for a clip that cannot be read."""
Row = dict[str, Any]


@dataclass(frozen=True)
class CaptionerOptions:
    """How videos are captioned."""

    height: int = 64
    """Pixels; videos are scaled and cropped."""
    width: int = 64
    """Pixels."""
    num_frames: int = 9
    """4k+1, spread evenly over the clip."""
    question: str = ""
    """Condition of the caption, for models trained on questions; empty: the null condition."""
    prompt_length: int = 512
    """Tokens that the question is padded to."""
    seed: int = 0
    """Of the first video; the others count up."""
    batch_size: int = 1
    """Videos captioned at once."""
    dtype: str = "float32"
    """Of the model: float32, bfloat16 or float16."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How texts are sampled."""

    def __post_init__(self) -> None:
        check_least(self, height=2, width=2, num_frames=1, prompt_length=1, seed=0, batch_size=1)
        check_dtype(self.dtype)


def caption_videos(
    output: Path,
    model: str,
    videos: Mapping[str, str | None],
    write: Callable[[Captions], Mapping[str, str]],
    options: CaptionerOptions = CaptionerOptions(),
    share: Share = ONLY,
    device: str = "cpu",
) -> list[Record] | None:
    """Caption this process's share of the videos; the last process writes captions.jsonl and the benchmark's files.

    Args:
        model: folder of a UniViGUPipeline.
        videos: file by the benchmark's name of the video, or None where there is none.
        write: gives the benchmark's files by name.

    Returns:
        a row for each video ("key", "video", "caption", "seed", "error"), or None while other processes have some left.
    """
    if pipeline_class(model, "--model") != "UniViGUPipeline":
        raise DataError(f"--model={model!r}: writes no captions; expected a UniViGUPipeline")
    o, rows = options, []
    for number, (key, path) in enumerate(videos.items()):
        error = f"there is no video of the name {key!r}" if path is None else None
        rows.append({"key": key, "video": path, "caption": None, "seed": o.seed + number, "error": error})

    def run(pipeline: Pipeline, batch: list[Record]) -> list[Mapping[str, bytes]]:
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
        captions = {row["key"]: row["caption"] for row in rows}
        return {"captions.jsonl": "".join(map(to_line, rows)), **write(captions)}

    return export_rows(output, model, rows, options, run, merge, share, device, "captions")


def read_listing(path: str, fields: tuple[str, ...]) -> tuple[list[Row], list[str]]:
    """Rows of a benchmark's list, .jsonl, .json or .tsv, and the names of their videos.

    Args:
        fields: the first that a row has names its video; rows of aurora's list are ``{name: questions}``.
    """
    option = f"--annotations={path!r}"
    if not path.endswith((".jsonl", ".json", ".tsv")):
        raise DataError(f"{option}: expected a .jsonl, .json or .tsv file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".tsv"):
            csv.field_size_limit(1 << 27)
            rows: Any = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
        elif path.endswith(".json"):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in split_lines(text) if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{option}: cannot be read ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{option}: holds no list of rows")
    names = []
    for number, row in enumerate(rows, 1):
        name = None
        if isinstance(row, dict) and None not in row:  # csv's key of cells behind the last column
            only = next(iter(row)) if len(row) == 1 and isinstance(next(iter(row.values())), list) else None
            name = next((row[field] for field in fields if row.get(field) not in (None, "")), only)
        if name is None:
            raise DataError(f"{option}: row {number} has none of the fields {list(fields)}")
        names.append(str(name))
    return rows, names


def locate(names: list[str], videos: str | list[str]) -> dict[str, str | None]:
    """The videos' files: of the given name, or of that name and any video suffix; None where there is none."""
    files: dict[str, str] = {}
    for path in find_videos(videos):
        files.setdefault(Path(path).name.lower(), path)
        if is_video(Path(path)):
            files.setdefault(Path(path).stem.lower(), path)
    return {name: files.get(Path(name).name.lower()) for name in dict.fromkeys(names)}


def export_dream1k(
    output: Path, model: str, videos: str | list[str], annotations: str, **options: Any
) -> list[Record] | None:
    """Predictions for DREAM-1K beside captions.jsonl, in the form of the given list.

    tarsier's DREAM-1k.jsonl    ``tarsier/predictions.jsonl``: its rows, with ``text.prediction``
    VLMEvalKit's DREAM-1K.tsv   ``vlmevalkit/DREAM-1K.tsv``: its rows, with a column ``prediction``

    Args:
        videos: folder, pattern or list of the clips, named as in the list (1.mp4, ...).
        options: see :func:`caption_videos`.
    """
    rows, names = read_listing(annotations, ("vid", "video"))
    table = annotations.endswith(".tsv")
    if not table and not all(isinstance(row.get("text"), dict) for row in rows):
        raise DataError(f'--annotations={annotations!r}: expected rows with an object "text", as tarsier\'s')

    def write(captions: Captions) -> dict[str, str]:
        if table:
            return {"vlmevalkit/DREAM-1K.tsv": _table(rows, names, captions)}
        lines = []
        for row, name in zip(rows, names, strict=True):
            caption = captions[name]
            lines.append(
                to_line({**row, "text": {**row["text"], "prediction": FAILED if caption is None else caption}})
            )
        return {"tarsier/predictions.jsonl": "".join(lines)}

    return caption_videos(output, model, locate(names, videos), write, **options)


def export_vdc(
    output: Path,
    model: str,
    videos: str | list[str],
    category: Category = "detailed",
    annotations: str | None = None,
    task: str | None = None,
    **options: Any,
) -> list[Record] | None:
    """Predictions for a category of VDC beside captions.jsonl.

    any list, or none            ``aurora/{category}.json`` for aurora's post_eval
    rows in lmms-eval's order    ``lmms-eval/{task}.json`` for its model ``from_log``
    VLMEvalKit's VDC.tsv         only ``vlmevalkit/VDC.tsv``: the category's rows, with a column ``prediction``

    Args:
        videos: folder, pattern or list of the clips, named by their ids.
        annotations: the list; rows have ``video_name`` (lmms-eval's data set), ``video_id`` (aurora's) or ``video``.
        task: lmms-eval's name of the task; None is ``vdc_{category}``.
        options: see :func:`caption_videos`.
    """
    if annotations is None:
        names = [Path(path).stem for path in find_videos(videos)]
        if twice := sorted(name for name, count in Counter(names).items() if count > 1):
            raise DataError(f"--videos: two files are called {twice[0]!r}; an id must be one video's")
        rows: list[Row] = [{"video_id": name} for name in names]
    else:
        rows, names = read_listing(annotations, ("video_name", "video_id", "video"))
    table = annotations is not None and annotations.endswith(".tsv")
    if table and "caption_type" in rows[0]:
        keep = [i for i, row in enumerate(rows) if row["caption_type"] == category]
        if not keep:
            raise DataError(f"--annotations={annotations!r}: no row has caption_type={category!r}")
        rows, names = [rows[i] for i in keep], [names[i] for i in keep]

    def write(captions: Captions) -> dict[str, str]:
        if table:
            return {"vlmevalkit/VDC.tsv": _table(rows, names, captions)}
        records = [
            {"doc_id": i, "doc": {"video_id": Path(name).stem, "video_name": name}, "resps": [[captions[name] or ""]]}
            for i, name in enumerate(names)
        ]
        files = {f"aurora/{category}.json": to_json(records, 1) + "\n"}
        if annotations is not None:
            name = task or f"vdc_{category}"
            arguments = {"model": "univigu", "model_args": f"pretrained={model}", "limit": None}
            log = {"args": arguments, "model_configs": {"task": name}, "time": "0101_0000", "logs": records}
            files[f"lmms-eval/{name}.json"] = to_json(log, 1) + "\n"
        return files

    return caption_videos(output, model, locate(names, videos), write, **options)


def _table(rows: list[Row], names: list[str], captions: Captions) -> str:
    """The rows as a .tsv with a column ``prediction``; empty for clips that cannot be read."""
    buffer = io.StringIO(newline="")
    columns = [*(name for name in rows[0] if name != "prediction"), "prediction"]
    writer = csv.DictWriter(buffer, columns, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "prediction": captions[name] or ""} for row, name in zip(rows, names, strict=True))
    return buffer.getvalue()
