"""Runs a model on a list of inputs for a benchmark outside of this project; resumable, by several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univigu.data.parts import Record, Result, run_jobs
from univigu.data.processes import Share
from univigu.data.synthesis.sources import load_pipeline
from univigu.models.fingerprint import folder_fingerprint

if TYPE_CHECKING:
    from univigu.evaluation.caption_export import CaptionerOptions
    from univigu.evaluation.vbench import VBenchOptions

Pipeline = Callable[[], Any]
"""Gives the model; loads it at the first call."""


def export_rows(
    output: Path,
    model: str,
    rows: Sequence[Record],
    options: VBenchOptions | CaptionerOptions,
    run: Callable[[Pipeline, list[Record]], list[Mapping[str, bytes]]],
    merge: Callable[[list[Record]], Mapping[str, str]],
    share: Share,
    device: str,
    description: str,
) -> list[Record] | None:
    """Complete this process's share of the rows; those with an entry "error" are tried again by the next call.

    Args:
        rows: what is known of each input, which "key", "prompt" and "text" identify; those with an error are not run.
        run: fills in a batch of rows and gives the files of each by name.
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

    return run_jobs(output, parameters, len(rows), make, merge, options.batch_size, share, description)
