"""Captions in the forms that the scorers of DREAM-1K and VDC read; these ask language models and stay outside.

DREAM-1K (Wang et al., 2024, arXiv:2407.00634) is scored by tarsier's ``evaluation.evaluate`` or by VLMEvalKit,
VDC (Chai et al., 2024, arXiv:2410.03051) by aurora's ``post_eval``, by lmms-eval or by VLMEvalKit.
docs/EVALUATION.md has the commands.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from univigu.data.inputs import find_videos
from univigu.data.options import check_dtype, check_least
from univigu.data.parts import Record, run_jobs
from univigu.data.processes import ONLY, Share
from univigu.data.rows import split_lines, to_json, to_line
from univigu.data.sample import DataError, is_video
from univigu.data.synthesis.sources import load_pipeline, pipeline_class
from univigu.data.video import VideoError, read_video
from univigu.models.fingerprint import folder_fingerprint
from univigu.sampling.options import SamplingOptions

Category = Literal["short", "background", "main_object", "camera", "detailed"]
FAILED = "<error>"
"""Caption of a clip that cannot be read, as in tarsier's own predictions."""
Forms = Callable[[dict[str, str | None]], dict[str, str]]
"""A benchmark's files by name, given the captions by video."""


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
    videos: dict[str, str | None],
    options: CaptionerOptions = CaptionerOptions(),
    share: Share = ONLY,
    device: str = "cpu",
    forms: Forms | None = None,
) -> list[dict[str, Any]] | None:
    """Caption this process's part of the videos; the last process writes captions.jsonl and other forms of it.

    Args:
        output: folder of the run.
        model: folder of a UniViGUPipeline.
        videos: file by the benchmark's name of the video, or None where there is none.
        forms: gives the other forms.

    Returns:
        a row for each video ("key", "video", "caption", "seed", "error"), or None while other processes have some left.

    Raises:
        DataError: the model cannot be read, or the folder holds another run.
    """
    if pipeline_class(model, "--model") != "UniViGUPipeline":
        raise DataError(f"--model={model!r}: writes no captions; expected a UniViGUPipeline")
    names = list(videos)
    digest = hashlib.sha256(repr(names).encode()).hexdigest()
    parameters = {"model": folder_fingerprint(model), "videos": digest, **asdict(options)}
    pipe: Any = None

    def make(numbers: Sequence[int]) -> Iterator[tuple[int, Record, Mapping[str, bytes]]]:
        nonlocal pipe
        frames: dict[int, torch.Tensor] = {}
        rows: dict[int, Record] = {}
        for number in numbers:
            name = names[number]
            rows[number] = {"key": name, "video": videos[name], "caption": None, "seed": options.seed + number}
            rows[number]["error"] = None
            try:
                frames[number] = _read(name, videos[name], options)
            except VideoError as error:
                rows[number]["error"] = str(error)
        if frames:
            pipe = pipe or load_pipeline(model, options.dtype, device, "--model")
            made = pipe.caption(
                torch.stack(list(frames.values())).float() / 255,
                options.question or None,
                generator=[torch.Generator("cpu").manual_seed(rows[number]["seed"]) for number in frames],
                options=options.sampling,
                max_sequence_length=options.prompt_length,
            )
            for number, text in zip(frames, made.text, strict=True):
                rows[number]["caption"] = text
        yield from ((number, row, {}) for number, row in rows.items())

    def merge(rows: list[Record]) -> dict[str, str]:
        captions = {row["key"]: row["caption"] for row in rows}
        return {"captions.jsonl": "".join(map(to_line, rows)), **(forms(captions) if forms is not None else {})}

    return run_jobs(output, parameters, len(names), make, merge, options.batch_size, share, "captions")


def _read(name: str, path: str | None, options: CaptionerOptions) -> torch.Tensor:
    if path is None:
        raise VideoError(f"there is no video of the name {name!r}")
    return read_video(path, options.num_frames, options.height, options.width)


# ------------------------------------------------------------------ lists of the benchmarks


@dataclass
class Listing:
    """A benchmark's own list of its items."""

    rows: list[dict[str, Any]]
    names: list[str]
    """By row: the video's name."""
    columns: list[str] | None = None
    """Of a table; None where rows are json."""


def read_listing(path: str, field_names: tuple[str, ...]) -> Listing:
    """Read a benchmark's list: .jsonl or .json rows, a .tsv table, or aurora's lines ``{video: questions}``.

    Args:
        path: the file.
        field_names: fields of which the first that a row has names its video.

    Raises:
        DataError: the file or a row of it is not of that kind.
    """
    if not path.endswith((".jsonl", ".json", ".tsv")):
        raise DataError(f"--annotations={path!r}: expected a .jsonl, .json or .tsv file")
    columns = None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".tsv"):
            csv.field_size_limit(1 << 27)
            table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
            rows, columns = list(table), list(table.fieldnames or [])
        elif path.endswith(".json"):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in split_lines(text) if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"--annotations={path!r}: cannot be read ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"--annotations={path!r}: holds no list of rows")
    names = []
    for number, row in enumerate(rows, 1):
        name = None
        if isinstance(row, dict):
            only = next(iter(row)) if len(row) == 1 and isinstance(next(iter(row.values())), list) else None
            name = next((row[field] for field in field_names if row.get(field) not in (None, "")), only)
        if name is None:
            raise DataError(f"--annotations={path!r}: row {number} has none of the fields {list(field_names)}")
        names.append(str(name))
    return Listing(rows, names, columns)


def locate(names: list[str], videos: str | list[str]) -> dict[str, str | None]:
    """The files of videos by name: of that very name, or of that name and any video suffix; None where there is none.

    Raises:
        DataError: ``videos`` names no video at all.
    """
    files: dict[str, str] = {}
    for path in find_videos(videos):
        files.setdefault(Path(path).name.lower(), path)
        if is_video(Path(path)):
            files.setdefault(Path(path).stem.lower(), path)
    return {name: files.get(Path(name).name.lower()) for name in dict.fromkeys(names)}


# ------------------------------------------------------------------ benchmarks


def export_dream1k(
    output: Path,
    model: str,
    videos: str | list[str],
    annotations: str,
    options: CaptionerOptions = CaptionerOptions(),
    share: Share = ONLY,
    device: str = "cpu",
) -> list[dict[str, Any]] | None:
    """Predictions for DREAM-1K beside captions.jsonl, in the form that belongs to the given list.

    tarsier's DREAM-1k.jsonl    ``tarsier/predictions.jsonl``: its rows, with ``text.prediction``
    VLMEvalKit's DREAM-1K.tsv   ``vlmevalkit/DREAM-1K.tsv``: its rows, with a column ``prediction``

    ``videos`` is a folder, pattern or list of the clips, named as in the list ``annotations`` (1.mp4, ...).
    Other arguments and errors are those of :func:`caption_videos`.
    """
    listing = read_listing(annotations, ("vid", "video"))
    if listing.columns is None and not all(isinstance(row.get("text"), dict) for row in listing.rows):
        raise DataError(
            f'--annotations={annotations!r}: expected rows with an object "text", as tarsier\'s DREAM-1k.jsonl'
        )

    def forms(texts: dict[str, str | None]) -> dict[str, str]:
        if listing.columns is not None:
            return {"vlmevalkit/DREAM-1K.tsv": _table(listing, texts)}
        lines = []
        for row, name in zip(listing.rows, listing.names, strict=True):
            prediction = FAILED if texts[name] is None else texts[name]
            lines.append(to_line({**row, "text": {**row["text"], "prediction": prediction}}))
        return {"tarsier/predictions.jsonl": "".join(lines)}

    return caption_videos(output, model, locate(listing.names, videos), options, share, device, forms)


def export_vdc(
    output: Path,
    model: str,
    videos: str | list[str],
    category: Category = "detailed",
    annotations: str | None = None,
    task: str | None = None,
    options: CaptionerOptions = CaptionerOptions(),
    share: Share = ONLY,
    device: str = "cpu",
) -> list[dict[str, Any]] | None:
    """Predictions for a category of VDC beside captions.jsonl.

    any list, or none            ``aurora/{category}.json`` for aurora's post_eval
    rows in lmms-eval's order    ``lmms-eval/{task}.json`` for its model ``from_log``
    VLMEvalKit's VDC.tsv         ``vlmevalkit/VDC.tsv`` alone: the category's rows, with a column ``prediction``

    Args:
        videos: folder, pattern or list of the clips, named by their ids.
        annotations: the list; rows have ``video_name`` (lmms-eval's data set), ``video_id`` (aurora's) or ``video``.
        task: lmms-eval's name of the task; None is ``vdc_{category}``.
        options, share, device: as in :func:`caption_videos`, as are the errors.
    """
    if annotations is None:
        names = [Path(path).stem for path in find_videos(videos)]
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise DataError(f"--videos: two files are called {twice[0]!r}; an id must be one video's")
        listing = Listing([{"video_id": name} for name in names], names)
    else:
        listing = read_listing(annotations, ("video_name", "video_id", "video"))
    if listing.columns is not None and "caption_type" in listing.columns:
        keep = [i for i, row in enumerate(listing.rows) if row["caption_type"] == category]
        if not keep:
            raise DataError(f"--annotations={annotations!r}: no row has caption_type={category!r}")
        listing = Listing([listing.rows[i] for i in keep], [listing.names[i] for i in keep], listing.columns)

    def forms(texts: dict[str, str | None]) -> dict[str, str]:
        if listing.columns is not None:
            return {"vlmevalkit/VDC.tsv": _table(listing, texts)}
        answers = [texts[name] or "" for name in listing.names]
        records = [
            {"doc_id": i, "doc": {"video_id": Path(name).stem, "video_name": name}, "resps": [[text]]}
            for i, (name, text) in enumerate(zip(listing.names, answers, strict=True))
        ]
        files = {f"aurora/{category}.json": to_json(records, 1) + "\n"}
        if annotations is not None:
            name = task or f"vdc_{category}"
            arguments = {"model": "univigu", "model_args": f"pretrained={model}", "limit": None}
            log = {"args": arguments, "model_configs": {"task": name}, "time": "0101_0000", "logs": records}
            files[f"lmms-eval/{name}.json"] = to_json(log, 1) + "\n"
        return files

    return caption_videos(output, model, locate(listing.names, videos), options, share, device, forms)


def _table(listing: Listing, texts: dict[str, str | None]) -> str:
    """The list's rows as a .tsv with a column ``prediction``; empty for clips that cannot be read."""
    assert listing.columns is not None
    buffer = io.StringIO(newline="")
    columns = [*(name for name in listing.columns if name != "prediction"), "prediction"]
    writer = csv.DictWriter(buffer, columns, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for row, name in zip(listing.rows, listing.names, strict=True):
        writer.writerow({**row, "prediction": texts[name] or ""})
    return buffer.getvalue()
