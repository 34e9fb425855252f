"""Clips that a diffusers text-to-video pipeline generates from prompts."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from univigu.data.inputs import read_prompts
from univigu.data.options import check_dtype, check_least
from univigu.data.sample import DataError
from univigu.data.shards import sha256_of
from univigu.data.video import to_uint8
from univigu.models.fingerprint import folder_fingerprint


@dataclass(frozen=True)
class VideoOptions:
    """How clips are generated."""

    height: int = 64
    """Pixels, even."""
    width: int = 64
    """Pixels, even."""
    num_frames: int = 9
    """Frames of a clip; 4k+1 for Wan."""
    fps: int = 8
    """Frames a second of the files; 16 for Wan2.1."""
    steps: int = 20
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance; default: the pipeline's."""
    negative_prompt: str | None = None
    """Default: the pipeline's."""
    batch_size: int = 4
    """Clips generated at once; other sizes round differently."""
    videos_per_prompt: int = 1
    """Clips of each prompt, each with its own seed."""
    seed: int = 0
    """Seed of the first clip; the others count up."""
    dtype: str = "float32"
    """Of generator and captioner: float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        check_least(self, height=2, width=2, num_frames=1, fps=1, steps=1, guidance_scale=0, seed=0)
        check_least(self, batch_size=1, videos_per_prompt=1)
        for name, value in (("height", self.height), ("width", self.width)):
            if value % 2:
                raise ValueError(f"{name}={value}: expected an even number")
        check_dtype(self.dtype)


@dataclass
class Clip:
    """A clip that becomes a sample of a shard."""

    key: str
    """The sample's key: the clip's number."""
    prompt: str
    seed: int
    """Seed of the clip's noise."""
    frames: torch.Tensor | None = None
    """uint8 [F, C, H, W]; None until they are generated, and where they are not finite."""
    caption: str = ""
    caption_seed: int | None = None
    """Seed of the caption, where it is sampled."""
    skipped: dict[str, str] | None = None
    """Why the clip is not used, as a row of the manifest's ``skipped``."""

    def skip(self, reason: str, field: str, value: str) -> None:
        self.skipped = {"reason": reason, "key": self.key, "field": field, "value": value[:200]}


def pipeline_class(folder: str | Path, option: str = "--pipeline") -> str:
    """Class of a folder's pipeline: "UniViGUPipeline", or that of diffusers; DataError if it is no such folder."""
    try:
        index = json.loads((Path(folder) / "model_index.json").read_text())
        unified = "UniViGUTransformer3DModel" in index.get("transformer", ())
        return "UniViGUPipeline" if unified else str(index["_class_name"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"{option}={str(folder)!r}: no folder of a diffusers pipeline (model_index.json: {error}); "
            "`python tools/convert.py pipeline --checkpoint CHECKPOINT --output FOLDER` writes one"
        ) from error


def load_pipeline(folder: str | Path, dtype: str, device: torch.device | str, option: str = "--pipeline") -> Any:
    """The pipeline of a folder, ours or any of diffusers, without progress bars; DataError if it cannot be loaded."""
    from diffusers import DiffusionPipeline

    from univigu.pipeline import UniViGUPipeline

    kind = UniViGUPipeline if pipeline_class(folder, option) == "UniViGUPipeline" else DiffusionPipeline
    try:
        pipe: Any = kind.from_pretrained(folder, torch_dtype=check_dtype(dtype)).to(device)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise DataError(f"{option}={str(folder)!r}: cannot be loaded ({error})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_clips(
    pipe: Any, prompts: list[str], seeds: list[int], options: VideoOptions, **more: Any
) -> list[torch.Tensor | None]:
    """uint8 frames [F, C, H, W] of each prompt; None where they are not finite.

    Every clip has its own generator on the CPU, so that a seed gives the same noise on any device and in any batch.
    Arguments in ``more`` are passed on if the pipeline, any text-to-video one of diffusers, knows them.
    """
    from diffusers import WanPipeline

    o = options
    arguments: dict[str, Any] = {
        "prompt": prompts,
        "height": o.height,
        "width": o.width,
        "num_frames": o.num_frames,
        "num_inference_steps": o.steps,
        "output_type": "pt",
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
    }
    if o.guidance_scale is not None:
        arguments["guidance_scale"] = o.guidance_scale
    if o.negative_prompt is not None:
        arguments["negative_prompt"] = [o.negative_prompt] * len(prompts)
    call = WanPipeline.__call__ if isinstance(pipe, WanPipeline) else pipe.__call__  # UniViGUPipeline's has **kwargs
    known = inspect.signature(call).parameters
    if unknown := sorted(arguments.keys() - known):
        raise DataError(f"{type(pipe).__name__} makes no video of a text; it takes no {unknown}")
    videos = pipe(**arguments, **{name: more[name] for name in more.keys() & known}).frames  # [B, F, C, H, W] in [0, 1]
    return [to_uint8(video).cpu() if torch.isfinite(video).all() else None for video in videos]


class PromptSource:
    """Clips that a text-to-video pipeline of diffusers generates from a .txt, .jsonl or .parquet file of prompts."""

    def __init__(self, prompts: str, pipeline: str, options: VideoOptions, device: torch.device | str = "cpu") -> None:
        if not prompts.endswith((".txt", ".jsonl", ".parquet")):
            raise DataError(f"--prompts={prompts!r}: expected a .txt, .jsonl or .parquet file")
        self.path, self.folder = Path(prompts), Path(pipeline)
        self.options, self.device = options, device
        self.rows = read_prompts(prompts, "--prompts")
        pipeline_class(pipeline)

    def __len__(self) -> int:
        return len(self.rows) * self.options.videos_per_prompt

    def parameters(self) -> dict[str, Any]:
        """What the clips depend on, for the manifest."""
        return {
            "source": "prompts",
            "prompts": {"file": self.path.name, "rows": len(self.rows), "sha256": sha256_of(self.path)},
            "generator": {"folder": self.folder.resolve().name, "fingerprint": folder_fingerprint(self.folder)},
            "video": asdict(self.options),
        }

    def clip(self, number: int) -> Clip:
        """The clip of a number, without its frames."""
        prompt, error = self.rows[number // self.options.videos_per_prompt]
        clip = Clip(f"{number:08d}", prompt, self.options.seed + number)
        if error is not None:
            clip.skip("invalid_prompt", "prompt", error)
        return clip

    @cached_property
    def pipeline(self) -> Any:
        return load_pipeline(self.folder, self.options.dtype, self.device)

    def render(self, clips: list[Clip]) -> None:
        """Generate the frames."""
        videos = generate_clips(self.pipeline, [c.prompt for c in clips], [c.seed for c in clips], self.options)
        for clip, frames in zip(clips, videos, strict=True):
            clip.frames = frames
