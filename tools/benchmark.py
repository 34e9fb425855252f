"""Measure speeds on the CPU, side by side in one run.

    python tools/benchmark.py caption     # a caption with and without the cache
    python tools/benchmark.py questions   # eight questions about a clip against one
    python tools/benchmark.py data        # the loader on videos and on latents, against decord itself

Each prints a table of medians; the variants take turns.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.console import Console
from rich.table import Table

from univigu.cli import ToolParser
from univigu.data.buckets import Bucket
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.encode import encode_shards
from univigu.data.index import index_folder
from univigu.data.loader import TrainLoader
from univigu.data.processes import SpawnPool
from univigu.data.sample import SampleRef
from univigu.models.foundation import EMBEDDED_FOUNDATION
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.sampling.options import SamplingOptions
from univigu.sampling.sampler import SampleInputs, Sampler
from univigu.shapes.write import world_fingerprint, write_shapes


def race(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant; they take turns, after one untimed round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(title: str, seconds: dict[str, float], baseline: str, unit: float = 1.0, name: str = "seconds") -> None:
    table = Table("", name, f"times faster than {baseline}", title=title)
    for way, value in seconds.items():
        table.add_row(way, f"{value / unit:.4g}", f"{seconds[baseline] / value:.1f}")
    Console(width=110).print(table)


def where() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


# ---------------------------------------------------------------------------- captions


def caption_flops(options: argparse.Namespace, prompt_length: int, tokens: int, keys: int) -> float:
    """Operations of one forward pass over so many tokens with so many self-attention keys."""
    width, ffn = options.width, options.ffn_dim
    layer = 6 * width**2 + 2 * keys * width + 2 * prompt_length * width + 2 * width * ffn
    return 2.0 * tokens * layer * options.layers + 2.0 * options.text_tokens * width * options.vocab_size


PROMPT_LENGTH = 64


def captioner(options: argparse.Namespace) -> tuple[UniViGUTransformer3DModel, Callable[[Any, range], torch.Tensor]]:
    """A model with random weights, and a function that gives the texts of some of its prompts about each video."""
    torch.manual_seed(0)
    model = UniViGUTransformer3DModel(
        num_attention_heads=options.width // 32,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=options.ffn_dim,
        num_layers=options.layers,
        vocab_size=options.vocab_size,
        text_flow="uniform",
        clean_video_reads_text=False,
        clean_video_reads_prompt=False,
    ).eval()
    torch.nn.init.normal_(model.text_head.linear.weight, std=0.2)  # it starts at zero, and draws would be all alike
    frames = options.video_tokens // 256
    if frames * 256 != options.video_tokens:
        raise SystemExit(f"--video-tokens {options.video_tokens}: expected a multiple of 256")
    latents = torch.randn(options.batch_size, 16, frames, 32, 32)
    embeds = torch.randn(32, PROMPT_LENGTH, 64)
    sampling = SamplingOptions(caption_steps=options.steps, temperature=1.0)

    def write(sampled: Any, prompts: range) -> torch.Tensor:
        sampler = Sampler(sampled, FlowMatchEulerDiscreteScheduler(), sampling)
        shown = embeds[prompts.start : prompts.stop].repeat(len(latents), 1, 1)
        seeds = [torch.Generator().manual_seed(100 * row + i) for row in range(len(latents)) for i in prompts]
        inputs = SampleInputs(shown, embeds[-1:], latents, text_length=options.text_tokens, generator=seeds)
        made = sampler.sample("caption", inputs).tokens
        assert made is not None
        return made.unflatten(0, (len(latents), -1))

    return model, write


def caption(options: argparse.Namespace) -> dict[str, float]:
    """Captions by random weights: the cached sampler, and the same without its cache."""
    model, write = captioner(options)
    tokens: dict[str, torch.Tensor] = {}
    ways: dict[str, Callable[[], Any]] = {
        "cached": lambda: tokens.update(cached=write(model, range(1))),
        "uncached": lambda: tokens.update(uncached=write(Uncached(model), range(1))),
    }
    seconds = race(ways, options.repeats)
    both = options.video_tokens + options.text_tokens
    full = caption_flops(options, PROMPT_LENGTH, both, both)
    text = caption_flops(options, PROMPT_LENGTH, options.text_tokens, both)
    bound = options.steps * full / (full + (options.steps - 1) * text)
    same = (tokens["cached"] == tokens["uncached"]).float().mean().item()
    title = f"{options.steps} steps, {options.video_tokens} + {options.text_tokens} tokens, batch {options.batch_size}"
    show(f"a batch of captions, {title}\n{where()}", seconds, "uncached")
    ratio = seconds["uncached"] / seconds["cached"]
    print(f"cached: {ratio:.1f}x the uncached loop (by operations at most {bound:.1f}x)")
    print(f"same tokens from the same random numbers, cached and uncached: {same:.2%}")
    return {"ratio": ratio, "bound": bound, "same": same}


def questions(options: argparse.Namespace) -> dict[str, float]:
    """Eight questions about a clip, which share its pass, against one question."""
    model, write = captioner(options)
    tokens: dict[str, torch.Tensor] = {}
    ways: dict[str, Callable[[], Any]] = {
        "one question": lambda: write(model, range(1)),
        "8 questions": lambda: tokens.update(together=write(model, range(8))),
        "one by one": lambda: tokens.update(alone=torch.cat([write(model, range(i, i + 1)) for i in range(8)], dim=1)),
    }
    seconds = race(ways, options.repeats)
    same = (tokens["together"] == tokens["alone"]).float().mean().item()
    title = f"{options.steps} steps, {options.video_tokens} + {options.text_tokens} tokens"
    show(f"answers, {title}\n{where()}", seconds, "one by one")
    ratio = seconds["8 questions"] / seconds["one question"]
    print(f"8 questions cost {ratio:.2f} times one (goal: 1.6); same tokens as one by one: {same:.2%}")
    return {"ratio": ratio, "same": same}


class Uncached:
    """The model without its cache: every pass computes the video, too."""

    def __init__(self, model: UniViGUTransformer3DModel) -> None:
        self.model, self.config, self.dtype, self.token_table = model, model.config, model.dtype, model.token_table
        self._video: tuple[Any, ...] = ()

    def __call__(self, *video: Any, text: Any = None, **_: Any) -> Any:
        if video[0] is not None:
            self._video = video
        return None if text is None else self.model(*self._video, text)


# ---------------------------------------------------------------------------- data


def data(options: argparse.Namespace) -> dict[str, float]:
    """The loader on video shards and on precomputed ones, against decord itself, in equally many processes."""
    if options.clips % (options.batch_size * options.workers):
        raise SystemExit(f"--clips {options.clips}: expected a multiple of --batch-size times --workers")
    bucket = Bucket.parse(options.size)
    folder = Path(options.folder) / f"{bucket}-{options.clips}-{world_fingerprint()}"
    size = asdict(bucket)
    with SpawnPool(options.workers) as pool:
        for split, count in (("train", options.clips), ("val", 1)):
            videos = folder / "videos" / split
            write_shapes(videos, split, count, shard_size=4, engine=pool.map, **size)  # type: ignore[arg-type]
            encode_shards(videos, folder / "latents" / split, options.foundation, buckets=[bucket], engine=pool.map)
        loaders = {name: _loader(folder / name, options, size) for name in ("videos", "latents")}
        refs, errors = index_folder(folder / "videos" / "train")
        assert len(refs) == options.clips and not errors

        def plain() -> None:
            jobs = [pool.submit(read_bare, refs[i :: options.workers]) for i in range(options.workers)]
            assert sum(job.result() for job in jobs) == options.clips * bucket.num_frames

        def drain(name: str) -> None:
            assert sum(len(batch["key"]) for batch in loaders[name]) == options.clips

        ways = {"decord": plain, "loader, videos": lambda: drain("videos"), "loader, latents": lambda: drain("latents")}
        seconds = race(ways, options.repeats)
    processes = f"{options.workers} process(es) of one thread, batch {options.batch_size}"
    title = f"a clip of {bucket}, {options.clips} clips, {processes}\n{where()}"
    show(title, seconds, "decord", options.clips * 1e-3, "ms")
    video_ratio = seconds["decord"] / seconds["loader, videos"]
    latents_ratio = seconds["loader, videos"] / seconds["loader, latents"]
    print(f"on videos the loader gives {video_ratio:.0%} of decord's clips (goal: 90%)")
    print(f"on latents it gives {latents_ratio:.0f}x as many as on videos (goal: 20x)")
    return {"video_ratio": video_ratio, "latents_ratio": latents_ratio}


def read_bare(refs: list[SampleRef]) -> int:
    """Decode all frames of these clips with decord; returns their number."""
    import decord

    frames = 0
    for ref in refs:
        reader = decord.VideoReader(io.BytesIO(ref.read("mp4")), num_threads=1)
        frames += len(reader.get_batch(range(len(reader))).asnumpy())
    return frames


def _loader(shards: Path, options: argparse.Namespace, size: dict[str, int]) -> TrainLoader:
    module = VideoTextDataModule(
        foundation=options.foundation,
        shards=str(shards),
        precompute=False,
        batch_size=options.batch_size,
        num_workers=options.workers,
        **size,
    )
    module.setup("fit")
    return module.train_dataloader()


CAPTION = {"text-tokens": 64, "video-tokens": 1280, "vocab-size": 4096, "width": 128, "ffn-dim": 512, "layers": 8}
DATA = {"size": "480x832x33", "clips": 16, "batch-size": 1, "workers": 1, "repeats": 5}
OPTIONS: dict[str, dict[str, Any]] = {
    "caption": CAPTION | {"steps": 50, "batch-size": 1, "repeats": 3},
    "questions": CAPTION | {"video-tokens": 3840, "text-tokens": 32, "steps": 8, "batch-size": 1, "repeats": 3},
    "data": DATA | {"foundation": EMBEDDED_FOUNDATION, "folder": "runs/data/benchmark"},
}
"""Options of each command, with their defaults."""


def main(args: list[str] | None = None) -> dict[str, float]:
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (caption, questions, data):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(measure=function)
        command.add_argument("--threads", type=int, help="default: torch's, one per core")
        for option, default in OPTIONS[function.__name__].items():
            command.add_argument(f"--{option}", type=type(default), default=default)
    options = parser.parse_args(args)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    found: dict[str, float] = options.measure(options)
    return found


if __name__ == "__main__":
    main()
