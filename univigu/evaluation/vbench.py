"""Videos for VBench (Huang et al., 2024, arXiv:2311.17982), which itself stays outside: it pins old libraries.

Its standard mode looks for ``{prompt}-{index}.mp4``, index 0 to 4, and takes the folder's other files for videos, so
they lie in a folder of their own.  Its custom mode (``--mode=custom_input --prompt_file``) reads a json object of file
names and prompts, which also serves prompts that make no file name.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from univigu.data.build import Share, alone, progress_bar
from univigu.data.inputs import read_prompts
from univigu.data.rows import to_json, to_line
from univigu.data.sample import DataError, is_unicode
from univigu.data.synthesis.options import check_dtype
from univigu.data.video import encode_mp4, to_uint8
from univigu.evaluation.ledger import ALONE, Ledger
from univigu.models.fingerprint import folder_fingerprint

MAX_NAME = 255
"""Bytes that a file name may have on the usual file systems."""


@dataclass(frozen=True)
class VBenchOptions:
    """How the videos are made."""

    samples: int = 5
    """Videos a prompt; VBench wants 5, and 25 for temporal flickering."""
    seed: int = 0
    """Of the first video; the others count up, so that no two have the same."""
    height: int = 64
    """Pixels."""
    width: int = 64
    """Pixels."""
    num_frames: int = 9
    """4k+1."""
    fps: int = 8
    """That the files play at; 16 for Wan2.1."""
    steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Classifier-free guidance."""
    negative_prompt: str | None = None
    """None is the null condition."""
    prompt_length: int = 512
    """Tokens that prompts are padded and cut to; how many were cut is recorded."""
    batch_size: int = 1
    """Videos made at once."""
    dtype: str = "float32"
    """Of the model: float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        least = {"samples": 1, "seed": 0, "height": 2, "width": 2, "num_frames": 1, "fps": 1, "steps": 1,
                 "prompt_length": 1, "batch_size": 1}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"vbench.{name}={getattr(self, name)}: expected at least {bound}")
        check_dtype(self.dtype, "vbench.dtype")


@dataclass(frozen=True)
class Video:
    """One video to make."""

    prompt: str
    """What VBench knows it by."""
    text: str
    """What it is made of: the prompt, or its augmented form."""
    index: int
    seed: int
    error: str | None = None
    """Why it cannot be made, if so."""

    @property
    def name(self) -> str:
        return video_name(self.prompt, self.index)


def video_name(prompt: str, index: int) -> str:
    """``{prompt}-{index}.mp4``; a prompt that makes no file name (too long, a slash, ...) is shortened and numbered.

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
        for index in range(options.samples):
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


def pipeline_class(folder: str) -> str:
    """The class of a pipeline's folder: "UniViGUPipeline", or any other's name in diffusers.

    Raises:
        DataError: it is no such folder.
    """
    try:
        index = json.loads((Path(folder) / "model_index.json").read_text())
        unified = "UniViGUTransformer3DModel" in index.get("transformer", ())
        return "UniViGUPipeline" if unified else str(index["_class_name"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"--model={folder!r}: no folder of a pipeline (model_index.json: {error}); make one with "
            "`python tools/convert.py pipeline --checkpoint CHECKPOINT --output FOLDER`"
        ) from error


def load_pipeline(folder: str, dtype: str, device: str) -> Any:
    """The pipeline of a folder: ours, or any text-to-video pipeline of diffusers, to compare with.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    from univigu.pipeline import UniViGUPipeline

    kind = UniViGUPipeline if pipeline_class(folder) == "UniViGUPipeline" else DiffusionPipeline
    try:
        pipe: Any = kind.from_pretrained(folder, torch_dtype=check_dtype(dtype, "dtype")).to(device)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise DataError(f"--model={folder!r}: cannot be loaded ({error})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export_vbench(
    output: Path,
    model: str,
    prompts: str,
    augmented: str | None = None,
    options: VBenchOptions = VBenchOptions(),
    share: Share = ALONE,
    device: str = "cpu",
) -> list[dict[str, Any]] | None:
    """Make this process's part of the videos; the process that finds all done writes prompts.json and videos.jsonl.

    Args:
        output: gets ``videos/*.mp4``, ``prompts.json`` (name: prompt, VBench's custom input) and ``videos.jsonl``
            (video, prompt, text, index, seed, tokens_cut, error).  A second program with the same share waits.
        model: folder of a pipeline.
        prompts, augmented: see :func:`plan`.

    Returns:
        the rows, or None while other processes have videos left to make.

    Raises:
        DataError: the prompts or the model cannot be read, or the folder holds another run.
    """
    videos = {video.name: video for video in plan(prompts, augmented, options)}
    pipeline_class(model)
    parameters = {
        "benchmark": "vbench", "model": folder_fingerprint(model), **asdict(options),
        "prompts": hashlib.sha256(repr([(v.prompt, v.text, v.error) for v in videos.values()]).encode()).hexdigest(),
    }  # fmt: skip
    with alone(output, share):
        ledger = Ledger(output, parameters, share)
        _make_missing(ledger, model, videos, options, device)
        rows = ledger.results(list(videos))
        if rows is not None:
            made = {row["key"]: row["prompt"] for row in rows if row["error"] is None}
            ledger.write("prompts.json", to_json(made, 1) + "\n")
            rows = [{"video": row["key"], **{name: row[name] for name in row if name != "key"}} for row in rows]
            ledger.write("videos.jsonl", "".join(to_line(row) for row in rows))
    return rows


def _make_missing(ledger: Ledger, model: str, videos: dict[str, Video], options: VBenchOptions, device: str) -> None:
    todo = [videos[name] for name in ledger.missing(videos)]
    for video in todo:
        if video.error is not None:
            ledger.add(video.name, video.error, **_row(video))
    good = [video for video in todo if video.error is None]
    if good:
        pipe = load_pipeline(model, options.dtype, device)
        with progress_bar() as bar:
            task = bar.add_task("VBench videos", total=len(good))
            for start in range(0, len(good), options.batch_size):
                batch = good[start : start + options.batch_size]
                for video, frames in zip(batch, _make(pipe, batch, options), strict=True):
                    if frames is None:
                        ledger.add(video.name, "the model gave numbers that are not finite", **_row(video))
                        continue
                    ledger.write(f"videos/{video.name}", encode_mp4(frames, options.fps))
                    ledger.add(video.name, None, **_row(video, _cut(pipe, video.text, options.prompt_length)))
                bar.advance(task, len(batch))


def _row(video: Video, cut: int = 0) -> dict[str, Any]:
    return {"prompt": video.prompt, "text": video.text, "index": video.index, "seed": video.seed, "tokens_cut": cut}


def _cut(pipe: Any, text: str, length: int) -> int:
    """Tokens of a prompt that its slot has no room for, which the pipeline leaves out."""
    tokenizer = getattr(pipe, "tokenizer", None)
    return 0 if tokenizer is None else max(0, len(tokenizer(text, verbose=False)["input_ids"]) - length)


def _make(pipe: Any, videos: list[Video], options: VBenchOptions) -> Iterator[torch.Tensor | None]:
    """uint8 frames [F, C, H, W] of each; None where they are not finite."""
    from diffusers import WanPipeline

    arguments: dict[str, Any] = {
        "prompt": [video.text for video in videos], "height": options.height, "width": options.width,
        "num_frames": options.num_frames, "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale, "max_sequence_length": options.prompt_length, "output_type": "pt",
        # on the CPU, so that a seed gives the same noise on any device and in any batch
        "generator": [torch.Generator("cpu").manual_seed(video.seed) for video in videos],
    }  # fmt: skip
    if options.negative_prompt is not None:
        arguments["negative_prompt"] = [options.negative_prompt] * len(videos)
    # ours takes WanPipeline's arguments and hands them on
    known = inspect.signature(WanPipeline.__call__ if isinstance(pipe, WanPipeline) else pipe.__call__).parameters
    if "max_sequence_length" not in known:
        del arguments["max_sequence_length"]
    if unknown := sorted(set(arguments) - set(known)):
        raise DataError(f"--model: {type(pipe).__name__} makes no video of a text; it takes no {unknown}")
    for frames in pipe(**arguments).frames:  # [F, C, H, W] in [0, 1]
        if torch.isfinite(frames).all():
            yield to_uint8(frames).cpu()
        else:
            yield None
