"""Captions in the forms that the scorers of DREAM-1K and VDC read; the scorers ask language models and stay outside.

DREAM-1K (Wang et al., 2024, arXiv:2407.00634) is scored by tarsier's ``evaluation.evaluate`` or by VLMEvalKit,
VDC (Chai et al., 2024, arXiv:2410.03051) by aurora's ``post_eval``, by lmms-eval or by VLMEvalKit.  The forms are what
those programs' sources read; docs/EVALUATION.md has the commands.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from univigu.data.build import Share, alone, progress_bar
from univigu.data.inputs import find_videos
from univigu.data.rows import split_lines, to_json, to_line
from univigu.data.sample import DataError, is_video
from univigu.data.synthesis.options import check_dtype
from univigu.data.video import VideoError, read_video
from univigu.evaluation.ledger import ALONE, Ledger
from univigu.evaluation.vbench import load_pipeline, pipeline_class
from univigu.models.fingerprint import folder_fingerprint
from univigu.sampling.options import SamplingOptions

Category = Literal["short", "background", "main_object", "camera", "detailed"]
FAILED = "<error>"
"""What stands for the caption of a clip that cannot be read, as in tarsier's own predictions."""
Forms = Callable[[dict[str, str | None]], dict[str, str]]
"""Of captions by video, what a benchmark's files hold by their names."""


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
    """What the caption is conditioned on, for models trained on questions; empty captions from the video alone."""
    prompt_length: int = 512
    """Tokens that the question is padded to."""
    seed: int = 0
    """Of the first video; the others count up."""
    batch_size: int = 1
    """Videos captioned at once."""
    dtype: str = "float32"
    """Of the model: float32, bfloat16 or float16."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How texts are drawn."""

    def __post_init__(self) -> None:
        least = {"height": 2, "width": 2, "num_frames": 1, "prompt_length": 1, "seed": 0, "batch_size": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"captions.{name}={getattr(self, name)}: expected at least {bound}")
        check_dtype(self.dtype, "captions.dtype")


def caption_videos(
    output: Path,
    model: str,
    videos: dict[str, str | None],
    options: CaptionerOptions = CaptionerOptions(),
    share: Share = ALONE,
    device: str = "cpu",
    forms: Forms | None = None,
) -> list[dict[str, Any]] | None:
    """Caption this process's part of the videos; where it is the last one, write captions.jsonl and other forms of it.

    Args:
        output: folder of the run; a second program with the same share of it waits for this one.
        model: folder of a UniViGUPipeline.
        videos: by the name that the benchmark knows a video by, the file, or None where there is none.
        forms: gives the other forms.

    Returns:
        a row for each video ("key", "video", "caption", "seed", "error"), or None while other processes have some left.

    Raises:
        DataError: the model cannot be read, or the folder holds another run.
    """
    pipeline_class(model)
    names = hashlib.sha256(repr(list(videos)).encode()).hexdigest()
    parameters = {"model": folder_fingerprint(model), "videos": names, **asdict(options)}
    with alone(output, share):
        ledger = Ledger(output, parameters, share)
        _caption_missing(ledger, model, videos, options, device)
        rows = ledger.results(list(videos))
        if rows is not None:
            ledger.write("captions.jsonl", "".join(to_line(row) for row in rows))
            texts = {row["key"]: row["caption"] for row in rows}
            for name, content in (forms(texts) if forms is not None else {}).items():
                ledger.write(name, content)
    return rows


def _caption_missing(
    ledger: Ledger, model: str, videos: dict[str, str | None], options: CaptionerOptions, device: str
) -> None:
    seeds = {name: options.seed + i for i, name in enumerate(videos)}
    todo = ledger.missing(videos)
    pipe = None
    with progress_bar() as bar:
        task = bar.add_task("captions", total=len(todo))
        for start in range(0, len(todo), options.batch_size):
            frames: dict[str, torch.Tensor] = {}
            batch = todo[start : start + options.batch_size]
            for name in batch:
                path, size = videos[name], (options.num_frames, options.height, options.width)
                try:
                    if path is None:
                        raise VideoError(f"no video of the name {name!r} is there")
                    frames[name] = read_video(path, *size)
                except VideoError as error:
                    ledger.add(name, str(error), video=path, caption=None, seed=seeds[name])
            if frames:
                pipe = pipe or _captioner(model, options, device)
                texts = _captions(pipe, list(frames.values()), [seeds[name] for name in frames], options)
                for name, text in zip(frames, texts, strict=True):
                    ledger.add(name, None, video=videos[name], caption=text, seed=seeds[name])
            bar.advance(task, len(batch))


def _captioner(model: str, options: CaptionerOptions, device: str) -> Any:
    pipe = load_pipeline(model, options.dtype, device)
    if not hasattr(pipe, "caption"):
        raise DataError(f"--model={model!r}: {type(pipe).__name__} writes no captions; expected a UniViGUPipeline")
    return pipe


def _captions(pipe: Any, frames: list[torch.Tensor], seeds: list[int], options: CaptionerOptions) -> list[str]:
    made = pipe.caption(
        torch.stack(frames).float() / 255,
        options.question or None,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        options=replace(options.sampling),
        max_sequence_length=options.prompt_length,
    )
    return list(made.text)


# ------------------------------------------------------------------------ what the benchmarks list


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


# ------------------------------------------------------------------------ benchmarks


def export_dream1k(
    output: Path,
    model: str,
    videos: str | list[str],
    annotations: str,
    options: CaptionerOptions = CaptionerOptions(),
    share: Share = ALONE,
    device: str = "cpu",
) -> list[dict[str, Any]] | None:
    """Predictions for DREAM-1K beside captions.jsonl, in the form that belongs to the given list.

    tarsier's DREAM-1k.jsonl    ``tarsier/predictions.jsonl``: its rows, with ``text.prediction``
    VLMEvalKit's DREAM-1K.tsv   ``vlmevalkit/DREAM-1K.tsv``: its rows, with a column ``prediction``

    Args:
        videos: folder, pattern or list of the clips, named as in the list (1.mp4, ...).
        annotations: the list.
        options, share, device: as in :func:`caption_videos`.

    Raises:
        DataError: the list is of neither kind, or as :func:`caption_videos`.
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
    share: Share = ALONE,
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
        options, share, device: as in :func:`caption_videos`.

    Raises:
        DataError: as :func:`caption_videos`, or the list has no row of the category.
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
        records = [{"doc_id": i, "doc": {"video_id": Path(name).stem, "video_name": name}, "resps": [[text]]}
                   for i, (name, text) in enumerate(zip(listing.names, answers, strict=True))]  # fmt: skip
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
