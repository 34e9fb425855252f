"""Videos for VBench (Huang et al., 2024, arXiv:2311.17982), which is no dependency because it pins old libraries.

Its standard mode looks for ``{prompt}-{index}.mp4``, index 0 to 4.  It reads every file of the folder as a video, so
the lists are written elsewhere.  Its custom mode (``--mode=custom_input --prompt_file``) reads a json object of file
names and prompts, which also serves prompts that are no valid file names.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from univigu.data.inputs import read_list, text_of
from univigu.data.options import check_least
from univigu.data.rows import read_rows, to_json, to_line
from univigu.data.sample import DataError
from univigu.data.shards import Engine, Manifest, ShardInfo, build_folder, replacing, sha256_of
from univigu.data.synthesis import Pipeline, VideoOptions
from univigu.data.video import encode_mp4
from univigu.models.fingerprint import folder_fingerprint

MAX_NAME = 255  # bytes of a file name on the usual file systems
Row = dict[str, Any]


@dataclass(frozen=True)
class ExportOptions(VideoOptions):
    """How the videos are generated."""

    steps: int = 50
    guidance_scale: float | None = 5.0
    """Classifier-free guidance."""
    batch_size: int = 1
    videos_per_prompt: int = 5
    """Videos of each prompt: VBench expects 5, and 25 for temporal flickering."""
    prompt_length: int = 512
    """Tokens that prompts are padded and cut to; how many are cut is recorded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, prompt_length=1)


def video_name(prompt: str, index: int) -> str:
    """``{prompt}-{index}.mp4``, with a hash of a prompt that is no valid file name (too long, a slash, ...)."""
    name = f"{prompt}-{index}.mp4"
    unsafe = re.search(r"[/\\\x00-\x1f\x7f]|^[\s.]|\s$", prompt) or len(name.encode()) > MAX_NAME
    return f"{hashlib.sha256(prompt.encode()).hexdigest()}-{index}.mp4" if unsafe else name


def _read_prompts(path: str, option: str) -> list[tuple[str, str | None]]:
    """(prompt, error) of each row of a list, which may be VBench's own ``VBench_full_info.json``."""
    return [text_of(row, "prompt_en" if "prompt_en" in row.fields else "prompt") for row in read_list(path, option)]


def plan(prompts: str, augmented: str | None, options: ExportOptions) -> list[Row]:
    """The rows of ``videos.jsonl`` before anything is generated; a prompt that occurs twice gets its videos once.

    Args:
        augmented: file of longer prompts to generate the videos from, a row for each of ``prompts``, in its order.
    """
    rows = _read_prompts(prompts, "--prompts")
    texts = rows if augmented is None else _read_prompts(augmented, "--augmented")
    if len(texts) != len(rows):
        raise DataError(f"--augmented={augmented!r}: {len(texts)} rows for {len(rows)} prompts")
    videos: dict[str, Row] = {}
    for number, ((prompt, problem), (text, other)) in enumerate(zip(rows, texts, strict=True), 1):
        error, prompt = problem or other, prompt if problem is None else f"row {number}"
        for index in range(options.videos_per_prompt):
            row = {"prompt": prompt, "text": "" if error else text, "index": index, "seed": options.seed + len(videos)}
            name = video_name(prompt, index)
            videos.setdefault(name, {"video": name, **row, "tokens_cut": 0, "error": error})
    return list(videos.values())


@dataclass
class VideoExport:
    """A job: generates the videos of a batch of rows, and writes the rows; those with an "error" are not generated."""

    output: Path
    model: Pipeline
    options: ExportOptions

    def __call__(self, path: Path, job: list[Row]) -> ShardInfo:
        rows, options = [dict(row) for row in job], self.options
        todo = [row for row in rows if row["error"] is None]
        texts, seeds = [row["text"] for row in todo], [row["seed"] for row in todo]
        clips = self.model.clips(texts, seeds, max_sequence_length=options.prompt_length) if todo else []
        tokens = self.model.token_counts(texts) if todo else []
        for row, frames, count in zip(todo, clips, tokens, strict=True):
            row["tokens_cut"] = max(0, count - options.prompt_length)
            if frames is None:
                row["error"] = "the model gave numbers that are not finite"
                continue
            video = self.output / "videos" / row["video"]
            video.parent.mkdir(exist_ok=True)
            with replacing(video, path) as temporary:  # VBench reads the whole folder
                temporary.write_bytes(encode_mp4(frames, options.fps))
        with replacing(path) as temporary:
            temporary.write_text("".join(map(to_line, rows)), encoding="utf-8")
        failed = [{"reason": "error", "value": row["error"]} for row in rows if row["error"]]
        return ShardInfo(path.name, len(rows) - len(failed), path.stat().st_size, sha256_of(path), failed)


def export_vbench(
    output: Path,
    model: str,
    prompts: str,
    augmented: str | None,
    options: ExportOptions,
    engine: Engine = map,
    device: str = "cpu",
) -> list[Row]:
    """Generate the videos, and write the two lists when all are there.

    The output folder gets ``videos/*.mp4``, ``prompts.json`` (name: prompt, VBench's custom input) and ``videos.jsonl``
    (video, prompt, text, index, seed, tokens_cut, error), whose rows are returned. The model is a pipeline's folder,
    ours or any text-to-video pipeline of diffusers. Finished batches are kept in the hidden folder ``.parts``.
    """
    planned = plan(prompts, augmented, options)
    pipeline = Pipeline(model, options, device, "--model")
    digest = hashlib.sha256(repr([[row["prompt"], row["text"]] for row in planned]).encode()).hexdigest()
    parameters = {"model": folder_fingerprint(model), "inputs": digest, **asdict(options)}
    size, parts = options.batch_size, output / ".parts"
    jobs = {f"{start:08d}.jsonl": planned[start : start + size] for start in range(0, len(planned), size)}
    work = VideoExport(output, pipeline, options)
    build_folder(parts, Manifest("rows", parameters), jobs, work, engine)
    rows = [row.fields for name in jobs for row in read_rows(parts / name)]
    made = {row["video"]: row["prompt"] for row in rows if row["error"] is None}
    for name, text in (("prompts.json", to_json(made, 1) + "\n"), ("videos.jsonl", "".join(map(to_line, rows)))):
        with replacing(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return rows
