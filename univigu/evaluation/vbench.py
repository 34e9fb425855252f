"""Videos for VBench (Huang et al., 2024, arXiv:2311.17982), which itself stays outside: it pins old libraries.

Its standard mode looks for ``{prompt}-{index}.mp4``, index 0 to 4, and takes the folder's other files for videos, so
they have a folder of their own.  Its custom mode (``--mode=custom_input --prompt_file``) reads a json object of file
names and prompts, which also serves prompts that are no valid file names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from univigu.data.build import Engine
from univigu.data.inputs import read_list, text_of
from univigu.data.rows import to_json, to_line
from univigu.data.sample import DataError
from univigu.data.synthesis.sources import Pipeline, pipeline_class
from univigu.data.video import encode_mp4
from univigu.evaluation.exports import Export, ExportOptions, Row, write_files

MAX_NAME = 255  # bytes of a file name on the usual file systems


def video_name(prompt: str, index: int) -> str:
    """``{prompt}-{index}.mp4``; a prompt that is no valid file name (too long, a slash, ...) is shortened.

    Such a name ends in the hash of the whole prompt; VBench must then be told the prompt by its json file.
    """
    name = f"{prompt}-{index}.mp4"
    unsafe = re.search(r"[/\\\x00-\x1f\x7f]", prompt) or prompt != prompt.strip() or prompt.startswith(".")
    if not unsafe and len(name.encode()) <= MAX_NAME:
        return name
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    safe = re.sub(r"[/\\\x00-\x1f\x7f]+", " ", prompt).strip(". ")
    short = safe.encode()[:160].decode(errors="ignore").strip()
    return f"{short} {digest}-{index}.mp4"


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
class VideoExport(Export):
    """Generates the videos of rows."""

    def run(self, rows: list[Row]) -> list[Mapping[str, bytes]]:
        texts, length = [row["text"] for row in rows], self.options.prompt_length
        clips = self.model.clips(texts, [row["seed"] for row in rows], max_sequence_length=length)
        files: list[Mapping[str, bytes]] = []
        for row, frames, tokens in zip(rows, clips, self.model.token_counts(texts), strict=True):
            row["tokens_cut"] = max(0, tokens - length)
            if frames is None:
                row["error"] = "the model gave numbers that are not finite"
            files.append({} if frames is None else {f"videos/{row['video']}": encode_mp4(frames, self.options.fps)})
        return files


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
    ours or any text-to-video pipeline of diffusers.
    """
    planned = plan(prompts, augmented, options)
    pipeline_class(model, "--model")
    rows = VideoExport(output, Pipeline(model, options, device, "--model"), options).write(planned, engine)
    made = {row["video"]: row["prompt"] for row in rows if row["error"] is None}
    write_files(output, {"prompts.json": to_json(made, 1) + "\n", "videos.jsonl": "".join(map(to_line, rows))})
    return rows
