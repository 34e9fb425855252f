"""Runs a model on the inputs of a benchmark outside of this project; resumable, here or on many machines."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from univigu.data.build import Engine, build_folder
from univigu.data.options import check_least
from univigu.data.rows import split_lines, to_line
from univigu.data.shards import Manifest, ShardInfo, replacing, sha256_of
from univigu.data.synthesis.sources import Pipeline, VideoOptions
from univigu.models.fingerprint import folder_fingerprint
from univigu.sampling.options import SamplingOptions

CAPTION_ONLY = ("question",)
VIDEO_ONLY = ("fps", "steps", "guidance_scale", "negative_prompt", "videos_per_prompt")
"""Options that mean nothing to the other kind of export."""
Row = dict[str, Any]


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


@dataclass
class Export(ABC):
    """Completes rows, by batches: a job writes the rows of a batch, and the files that belong to them."""

    output: Path
    model: Pipeline
    options: ExportOptions

    @abstractmethod
    def run(self, rows: list[Row]) -> list[Mapping[str, bytes]]:
        """Fill in a batch of rows, and give the files by name that belong to each, if there are any."""

    def __call__(self, path: Path, job: list[Row]) -> ShardInfo:
        rows = [dict(row) for row in job]
        todo = [row for row in rows if row["error"] is None]
        for files in self.run(todo) if todo else []:
            for name, data in files.items():
                (self.output / name).parent.mkdir(exist_ok=True)
                with replacing(self.output / name, path) as temporary:  # benchmarks read whole folders
                    temporary.write_bytes(data)
        with replacing(path) as temporary:
            temporary.write_text("".join(map(to_line, rows)), encoding="utf-8")
        failed = [{"reason": "error", "value": row["error"]} for row in rows if row["error"]]
        return ShardInfo(path.name, len(rows) - len(failed), path.stat().st_size, sha256_of(path), failed)

    def write(self, rows: Sequence[Row], engine: Engine) -> list[Row]:
        """Complete all rows: of each "key", "prompt" and "text" identify the input; those with an "error" are not run.

        The batches are kept in the hidden folder ``.parts``; the next call tries those with errors again.
        """
        inputs = [[row.get(name) for name in ("key", "prompt", "text")] for row in rows]
        digest = hashlib.sha256(repr(inputs).encode()).hexdigest()
        parameters = {"model": folder_fingerprint(self.model.folder), "inputs": digest, **asdict(self.options)}
        size, parts = self.options.batch_size, self.output / ".parts"
        jobs = {f"{start:08d}.jsonl": list(rows[start : start + size]) for start in range(0, len(rows), size)}
        build_folder(parts, Manifest("rows", parameters), jobs, self, engine, retry_skipped=True)
        lines = (line for name in jobs for line in split_lines((parts / name).read_text("utf-8"))[:-1])
        return [json.loads(line) for line in lines]


def write_files(output: Path, files: Mapping[str, str]) -> None:
    """Write text files of a folder, each atomically."""
    for name, text in files.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
