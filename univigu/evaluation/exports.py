"""Runs a model on the inputs of a benchmark outside of this project; resumable, by several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from univigu.data.options import check_least
from univigu.data.parts import Record, Result, run_jobs
from univigu.data.processes import Share
from univigu.data.synthesis.sources import VideoOptions, load_pipeline
from univigu.models.fingerprint import folder_fingerprint
from univigu.sampling.options import SamplingOptions

CAPTION_ONLY = ("question",)
VIDEO_ONLY = ("fps", "steps", "guidance_scale", "negative_prompt", "videos_per_prompt")
"""Options that mean nothing to the other kind of export."""


@dataclass(frozen=True)
class ExportOptions(VideoOptions):
    """How videos are generated or captioned."""

    steps: int = 50
    """Denoising steps."""
    guidance_scale: float | None = 5.0
    """Classifier-free guidance."""
    batch_size: int = 1
    """Videos generated or captioned at once."""
    videos_per_prompt: int = 5
    """Videos of each prompt: VBench expects 5, and 25 for temporal flickering."""
    prompt_length: int = 512
    """Tokens that prompts are padded and cut to; how many are cut is recorded."""
    question: str = ""
    """Condition of the caption, for models trained on questions; empty: the null condition."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How captions are sampled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, prompt_length=1)


def export_rows(
    output: Path,
    model: str,
    rows: Sequence[Record],
    options: ExportOptions,
    run: Callable[[Callable[[], Any], list[Record]], list[Mapping[str, bytes]]],
    merge: Callable[[list[Record]], Mapping[str, str]],
    share: Share,
    device: str,
) -> list[Record] | None:
    """Complete this process's share of the rows; those with an entry "error" are tried again by the next call.

    Args:
        rows: what is known of each input, which "key", "prompt" and "text" identify; those with an error are not run.
        run: fills in a batch of rows and gives the files of each by name; its first argument gives the pipeline.
        merge: gives the files, by name, that are written once all rows are there.

    Returns:
        all rows, or None while other processes have some left.
    """
    inputs = [[row.get(name) for name in ("key", "prompt", "text")] for row in rows]
    digest = hashlib.sha256(repr(inputs).encode()).hexdigest()
    parameters = {"model": folder_fingerprint(model), "inputs": digest, **asdict(options)}

    @cache
    def pipeline() -> Any:
        return load_pipeline(model, options.dtype, device, "--model")

    def make(numbers: Sequence[int]) -> Iterator[Result]:
        batch = [dict(rows[number]) for number in numbers]
        todo = [row for row in batch if row["error"] is None]
        files = iter(run(pipeline, todo) if todo else [])
        for number, row in zip(numbers, batch, strict=True):
            yield number, row, next(files) if rows[number]["error"] is None else {}

    return run_jobs(output, parameters, len(rows), make, merge, options.batch_size, share, output.name)
