"""Videos for VBench (Huang et al., 2024, arXiv:2311.17982), which itself stays outside: it pins old libraries.

Its standard mode looks for ``{prompt}-{index}.mp4``, index 0 to 4, and takes the folder's other files for videos, so
they have a folder of their own.  Its custom mode (``--mode=custom_input --prompt_file``) reads a json object of file
names and prompts, which also serves prompts that are no valid file names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from univigu.data.inputs import read_prompts
from univigu.data.options import check_least
from univigu.data.parts import Record, run_jobs
from univigu.data.processes import ONLY, Share
from univigu.data.rows import to_json, to_line
from univigu.data.sample import DataError, is_unicode
from univigu.data.synthesis.sources import VideoOptions, generate_clips, load_pipeline, pipeline_class
from univigu.data.video import encode_mp4
from univigu.models.fingerprint import folder_fingerprint

MAX_NAME = 255
"""Bytes that a file name may have on the usual file systems."""


@dataclass(frozen=True)
class VBenchOptions(VideoOptions):
    """How the videos are made."""

    steps: int = 50
    """Denoising steps."""
    guidance_scale: float | None = 5.0
    """Classifier-free guidance."""
    negative_prompt: str | None = None
    """Default: the null condition."""
    batch_size: int = 1
    """Videos generated at once."""
    videos_per_prompt: int = 5
    """Videos of each prompt: VBench expects 5, and 25 for temporal flickering."""
    prompt_length: int = 512
    """Tokens that prompts are padded and cut to; how many are cut is recorded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, prompt_length=1)


@dataclass(frozen=True)
class Video:
    """One video to make."""

    prompt: str
    """VBench's prompt."""
    text: str
    """Prompt of the generator: the same, or its augmented form."""
    index: int
    seed: int
    error: str | None = None
    """Why it cannot be made, if so."""

    @property
    def name(self) -> str:
        return video_name(self.prompt, self.index)


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


def prompts_of(path: str, name: str = "--prompts") -> list[tuple[str, str | None]]:
    """(prompt, error) of each row of a .txt, .jsonl or .parquet file, or of VBench's own ``VBench_full_info.json``.

    Raises:
        DataError: the file is missing, of another kind, or holds no prompt.
    """
    if path.endswith((".txt", ".jsonl", ".parquet")):
        return read_prompts(path, name)
    if not path.endswith(".json"):
        raise DataError(f"{name}={path!r}: expected a .txt, .jsonl, .json or .parquet file")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{name}={path!r}: cannot be read ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f'{name}={path!r}: expected a list of objects with "prompt_en", as VBench_full_info.json')
    wrong = f'row {{}} of {path}: expected a string "prompt_en", got {{!r:.80}}'
    found = [row.get("prompt_en") if isinstance(row, dict) else None for row in rows]
    return [
        (v, None) if isinstance(v, str) else ("", wrong.format(i, str(rows[i - 1]))) for i, v in enumerate(found, 1)
    ]


def plan(prompts: str, augmented: str | None, options: VBenchOptions) -> list[Video]:
    """All videos of a run, in order; a prompt that comes twice is made once.

    Args:
        augmented: file of longer prompts to make the videos of, a row for each of ``prompts``, in its order.

    Raises:
        DataError: a file cannot be read, or the two differ in length.
    """
    rows = prompts_of(prompts)
    texts = rows if augmented is None else prompts_of(augmented, "--augmented")
    if len(texts) != len(rows):
        raise DataError(f"--augmented={augmented!r}: {len(texts)} rows for {len(rows)} prompts")
    videos: dict[tuple[str, int], Video] = {}
    for row, ((prompt, problem), (text, other)) in enumerate(zip(rows, texts, strict=True), 1):
        error = problem or other or _wrong(prompt) or _wrong(text)
        label = prompt if problem is None and _wrong(prompt) is None else f"row {row}"
        for index in range(options.videos_per_prompt):
            if (label, index) not in videos:
                videos[label, index] = Video(
                    label, text if error is None else "", index, options.seed + len(videos), error
                )
    return list(videos.values())


def _wrong(prompt: str) -> str | None:
    """Why a string is no prompt, if it is none."""
    if not is_unicode(prompt):
        return "a prompt that is no valid Unicode"
    return None if prompt.strip() else "an empty prompt"


def export_vbench(
    output: Path,
    model: str,
    prompts: str,
    augmented: str | None = None,
    options: VBenchOptions = VBenchOptions(),
    share: Share = ONLY,
    device: str = "cpu",
) -> list[dict[str, Any]] | None:
    """Make this process's part of the videos; the process that finds all of them done writes the two lists.

    Args:
        output: gets ``videos/*.mp4``, ``prompts.json`` (name: prompt, VBench's custom input) and ``videos.jsonl``
            (video, prompt, text, index, seed, tokens_cut, error).
        model: folder of a pipeline, ours or any text-to-video pipeline of diffusers.
        prompts, augmented: see :func:`plan`.

    Returns:
        the rows, or None while other processes have videos left to make.

    Raises:
        DataError: the prompts or the model cannot be read, or the folder holds another run.
    """
    videos = plan(prompts, augmented, options)
    pipeline_class(model, "--model")
    digest = hashlib.sha256(repr([(v.prompt, v.text, v.error) for v in videos]).encode()).hexdigest()
    parameters = {"benchmark": "vbench", "model": folder_fingerprint(model), "prompts": digest, **asdict(options)}
    pipe: Any = None

    def make(numbers: Sequence[int]) -> Iterator[tuple[int, Record, Mapping[str, bytes]]]:
        nonlocal pipe
        good = [number for number in numbers if videos[number].error is None]
        for number in numbers:
            if number not in good:
                yield number, _row(videos[number], videos[number].error), {}
        if not good:
            return
        pipe = pipe or load_pipeline(model, options.dtype, device, "--model")
        texts, seeds = [videos[number].text for number in good], [videos[number].seed for number in good]
        clips = generate_clips(pipe, texts, seeds, options, max_sequence_length=options.prompt_length)
        for number, frames in zip(good, clips, strict=True):
            video = videos[number]
            if frames is None:
                yield number, _row(video, "the model gave numbers that are not finite"), {}
                continue
            row = _row(video, None, _cut(pipe, video.text, options.prompt_length))
            yield number, row, {f"videos/{video.name}": encode_mp4(frames, options.fps, options.crf)}

    def merge(rows: list[Record]) -> dict[str, str]:
        made = {row["video"]: row["prompt"] for row in rows if row["error"] is None}
        return {"prompts.json": to_json(made, 1) + "\n", "videos.jsonl": "".join(map(to_line, rows))}

    return run_jobs(output, parameters, len(videos), make, merge, options.batch_size, share, "VBench videos")


def _row(video: Video, error: str | None, cut: int = 0) -> Record:
    source = {"prompt": video.prompt, "text": video.text, "index": video.index, "seed": video.seed}
    return {"video": video.name, **source, "tokens_cut": cut, "error": error}


def _cut(pipe: Any, text: str, length: int) -> int:
    """Tokens of a prompt over its slot, which the pipeline leaves out."""
    tokenizer = getattr(pipe, "tokenizer", None)
    return 0 if tokenizer is None else max(0, len(tokenizer(text, verbose=False)["input_ids"]) - length)
