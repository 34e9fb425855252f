"""Clips that a diffusers text-to-video pipeline generates from prompts."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from univigu.data.engine import Model
from univigu.data.options import check_dtype, check_least
from univigu.data.sample import DataError
from univigu.data.video import to_uint8


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


def pipeline_class(folder: str | Path, option: str = "--pipeline") -> str:
    """Class of a folder's pipeline: "UniViGUPipeline", or that of diffusers; DataError if it is no such folder."""
    try:
        index = json.loads((Path(folder) / "model_index.json").read_text())
        unified = "UniViGUTransformer3DModel" in index.get("transformer", ())
        return "UniViGUPipeline" if unified else str(index["_class_name"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        problem = f"no folder of a diffusers pipeline (model_index.json: {error})"
        raise DataError(f"{option}={str(folder)!r}: {problem}; `tools/convert.py pipeline` writes one") from error


@dataclass(eq=False)
class Pipeline(Model):
    """A folder's pipeline, ours or any text-to-video one of diffusers; a DataError if it cannot be loaded."""

    folder: str
    options: VideoOptions
    device: str
    option: str = "--pipeline"
    """Option that named the folder, for messages."""

    @cached_property
    def pipe(self) -> Any:
        from diffusers import DiffusionPipeline

        from univigu.models.weights import check_files
        from univigu.pipeline import UniViGUPipeline

        kind = UniViGUPipeline if pipeline_class(self.folder, self.option) == "UniViGUPipeline" else DiffusionPipeline
        try:
            check_files(Path(self.folder), subfolders=True)
            dtype = check_dtype(self.options.dtype)
            pipe: Any = kind.from_pretrained(self.folder, torch_dtype=dtype).to(self.device)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
            raise DataError(f"{self.option}={self.folder!r}: cannot be loaded ({error})") from error
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def clips(self, prompts: list[str], seeds: list[int], **more: Any) -> list[torch.Tensor | None]:
        """uint8 frames [F, C, H, W] of each prompt; None where they are not finite.

        Every clip has its own generator on the CPU, so that a seed gives the same noise on any device and in any batch.
        Arguments in ``more`` are passed on if the pipeline knows them.
        """
        from diffusers import WanPipeline

        o, pipe = self.options, self.pipe
        arguments: dict[str, Any] = {"prompt": prompts, "num_inference_steps": o.steps, "output_type": "pt"}
        arguments |= {"height": o.height, "width": o.width, "num_frames": o.num_frames}
        arguments["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        if o.guidance_scale is not None:
            arguments["guidance_scale"] = o.guidance_scale
        if o.negative_prompt is not None:
            arguments["negative_prompt"] = [o.negative_prompt] * len(prompts)
        # UniViGUPipeline's own has **kwargs.
        call = WanPipeline.__call__ if isinstance(pipe, WanPipeline) else pipe.__call__
        known = inspect.signature(call).parameters
        if unknown := sorted(arguments.keys() - known):
            raise DataError(f"{type(pipe).__name__} makes no video of a text; it takes no {unknown}")
        more = {name: more[name] for name in more.keys() & known}
        videos = pipe(**arguments, **more).frames  # [B, F, C, H, W] in [0, 1]
        return [to_uint8(video).cpu() if torch.isfinite(video).all() else None for video in videos]

    def token_counts(self, texts: list[str]) -> list[int]:
        """Tokens of texts by the pipeline's tokenizer; 0 without one."""
        tokenizer = getattr(self.pipe, "tokenizer", None)
        return [0 if tokenizer is None else len(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
