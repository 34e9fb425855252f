"""Where clips come from: a diffusers pipeline that is given prompts, or the embedded world."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from univigu.data.inputs import read_prompts
from univigu.data.sample import DataError
from univigu.data.shards import sha256_of
from univigu.data.synthesis.options import Clip, Rejection, VideoOptions, check_dtype
from univigu.data.video import to_uint8
from univigu.models.fingerprint import folder_fingerprint
from univigu.shapes import renderer, scenes, texts
from univigu.shapes.write import world_fingerprint


class PromptSource:
    """Clips that a text-to-video pipeline makes of prompts.

    Every clip has its own generator on the CPU, so that the same seeds give the same noise on any device.

    Args:
        prompts: a .txt, .jsonl or .parquet file; see :func:`univigu.data.inputs.read_prompts`.
        pipeline: folder of any diffusers text-to-video pipeline.
        options: size, steps, guidance, seeds.
        device: where it runs.

    Raises:
        DataError: the prompts cannot be read, or the folder holds no pipeline.
    """

    def __init__(self, prompts: str, pipeline: str, options: VideoOptions, device: torch.device | str = "cpu") -> None:
        if not prompts.endswith((".txt", ".jsonl", ".parquet")):
            raise DataError(f"--prompts={prompts!r}: expected a .txt, .jsonl or .parquet file")
        self.path, self.folder = Path(prompts), Path(pipeline)
        self.options, self.device = options, device
        self.rows = read_prompts(prompts, "--prompts")
        if not (self.folder / "model_index.json").is_file():
            raise DataError(f"--pipeline={pipeline!r}: no folder of a diffusers pipeline (it lacks model_index.json)")

    def __len__(self) -> int:
        return len(self.rows) * self.options.videos_per_prompt

    def parameters(self) -> dict[str, Any]:
        return {
            "source": "prompts",
            "prompts": {"file": self.path.name, "rows": len(self.rows), "sha256": sha256_of(self.path)},
            "generator": {"folder": self.folder.resolve().name, "fingerprint": folder_fingerprint(self.folder)},
            "video": asdict(self.options),
        }

    def clip(self, number: int) -> Clip:
        prompt, error = self.rows[number // self.options.videos_per_prompt]
        key = f"{number:08d}"
        if error is not None:
            raise Rejection("invalid_prompt", key, "prompt", error)
        return Clip(key, prompt, self.options.seed + number)

    @cached_property
    def pipeline(self) -> Any:
        """The loaded pipeline, without a progress bar of its own."""
        from diffusers import DiffusionPipeline

        try:
            dtype = check_dtype(self.options.dtype, "video.dtype")
            pipeline = DiffusionPipeline.from_pretrained(self.folder, torch_dtype=dtype).to(self.device)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
            raise DataError(f"--pipeline={str(self.folder)!r}: cannot be loaded ({error})") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def render(self, clips: list[Clip]) -> None:
        o = self.options
        arguments: dict[str, Any] = {
            "prompt": [clip.prompt for clip in clips], "height": o.height, "width": o.width,
            "num_frames": o.num_frames, "num_inference_steps": o.steps, "output_type": "pt",
            "generator": [torch.Generator("cpu").manual_seed(clip.seed) for clip in clips],
        }  # fmt: skip
        if o.guidance_scale is not None:
            arguments["guidance_scale"] = o.guidance_scale
        if o.negative_prompt is not None:
            arguments["negative_prompt"] = [o.negative_prompt] * len(clips)
        unknown = sorted(set(arguments) - set(inspect.signature(self.pipeline.__call__).parameters))
        if unknown:
            name = type(self.pipeline).__name__
            raise DataError(f"--pipeline={str(self.folder)!r}: {name} makes no video of a text; it takes no {unknown}")
        videos = self.pipeline(**arguments).frames  # [B, F, C, H, W] in [0, 1]
        for clip, video in zip(clips, videos, strict=True):
            if torch.isfinite(video).all():
                clip.frames = to_uint8(video).cpu()


class ShapesSource:
    """The embedded world: clips of moving shapes.

    Args:
        num_clips: how many.
        split: which of the world's streams.
        options: size and seeds.
    """

    def __init__(self, num_clips: int, split: scenes.Split, options: VideoOptions) -> None:
        if num_clips < 1:
            raise DataError(f"--num-clips={num_clips}: expected at least 1")
        self.num_clips, self.split, self.options = num_clips, split, options

    def __len__(self) -> int:
        return self.num_clips

    def parameters(self) -> dict[str, Any]:
        names = ("height", "width", "num_frames", "fps", "crf", "seed")
        return {
            "source": "shapes", "world": world_fingerprint(), "split": self.split, "num_clips": self.num_clips,
            "video": {name: getattr(self.options, name) for name in names},
        }  # fmt: skip

    def clip(self, number: int) -> Clip:
        seed = self.options.seed + number
        scene = scenes.sample_scene(seed, self.split)
        return Clip(f"{number:08d}", texts.prompt_of(scene), seed, scene=scene.to_dict())

    def render(self, clips: list[Clip]) -> None:
        o = self.options
        for clip in clips:
            scene = scenes.sample_scene(clip.seed, self.split)
            clip.frames = renderer.render(scene, o.height, o.width, o.num_frames)
