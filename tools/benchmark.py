"""Measure speeds on the CPU, side by side in one run.

    python tools/benchmark.py caption     # a caption with and without the cache
    python tools/benchmark.py questions   # eight questions about a clip against one
    python tools/benchmark.py data        # the loader on videos and on latents, against decord itself

The variants take turns.  Each command prints their median seconds, then the ratios.
"""

import argparse
import io
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from lightning.fabric.utilities import move_data_to_device
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from univigu.cli import ToolParser
from univigu.data.buckets import Bucket
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.engine import SpawnPool, this_device
from univigu.data.loader import TrainLoader
from univigu.data.sample import SampleRef
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.sampling.options import SamplingOptions
from univigu.sampling.sampler import SampleInputs, Sampler

SMALL = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": 8}
SMALL |= {"text_dim": 64, "freq_dim": 64}
Ways = dict[str, Callable[[], Any]]


def race(options: argparse.Namespace, ways: Ways, clips: int = 1) -> tuple[dict[str, float], dict[str, Any]]:
    """Print median seconds a clip; return them and the results.  Variants take turns, after one untimed round."""
    turns: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(options.repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = way()
            turns[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values[1:]) / clips for name, values in turns.items()}
    given = ", ".join(f"{name} {value}" for name, value in vars(options).items() if name != "measure")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{given}\n{machine}, torch {torch.__version__}")
    for name, value in seconds.items():
        print(f"{name}: {value:.4g} s")
    return seconds, results


def captioner(options: argparse.Namespace) -> tuple[UniViGUTransformer3DModel, Callable[[Any, range], torch.Tensor]]:
    """A model with random weights, and a function that gives the texts of some of its prompts about a video."""
    torch.manual_seed(0)
    alone = dict.fromkeys(("clean_video_reads_text", "clean_video_reads_prompt"), False)
    model = UniViGUTransformer3DModel(**SMALL, **alone, vocab_size=4096, text_flow="uniform").eval()
    torch.nn.init.normal_(model.text_head.linear.weight, std=0.2)  # zero at the start: all tokens equally likely
    latents, embeds = torch.randn(1, 16, options.frames, 32, 32), torch.randn(32, 64, 64)
    sampling = SamplingOptions(caption_steps=options.steps, temperature=1.0)

    def write(sampled: Any, prompts: range) -> torch.Tensor:
        sampler = Sampler(sampled, FlowMatchEulerDiscreteScheduler(), sampling)
        seeds = [torch.Generator().manual_seed(i) for i in prompts]
        shown = embeds[prompts.start : prompts.stop]
        inputs = SampleInputs(shown, embeds[-1:], latents, text_length=options.text_tokens, generator=seeds)
        tokens = sampler.sample("caption", inputs).tokens
        assert tokens is not None
        return tokens

    return model, write


class Uncached:
    """The model without its cache: every pass computes the video, too."""

    def __init__(self, model: UniViGUTransformer3DModel) -> None:
        self.model, self.config, self.dtype, self.token_table = model, model.config, model.dtype, model.token_table
        self._video: tuple[Any, ...] = ()

    def __call__(self, *video: Any, text: Any = None, **_: Any) -> Any:
        if video[0] is not None:
            self._video = video
        return None if text is None else self.model(*self._video, text)


def operations(way: Callable[[], Any]) -> int:
    """Operations of a call; torch counts those of attention only in its plain form."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def caption(options: argparse.Namespace) -> dict[str, float]:
    """Captions by random weights: the cached sampler, and the same without its cache."""
    model, write = captioner(options)
    ways: Ways = {"cached": lambda: write(model, range(1)), "uncached": lambda: write(Uncached(model), range(1))}
    bound = operations(ways["uncached"]) / operations(ways["cached"])
    seconds, tokens = race(options, ways)
    same = (tokens["cached"] == tokens["uncached"]).float().mean().item()
    speed = seconds["uncached"] / seconds["cached"]
    return {"speed of the cached loop": speed, "at most, by operations": bound, "share of same tokens": same}


def questions(options: argparse.Namespace) -> dict[str, float]:
    """Eight questions about a clip, which share its pass, against one question."""
    model, write = captioner(options)
    ways: Ways = {
        "one question": lambda: write(model, range(1)),
        "8 questions": lambda: write(model, range(8)),
        "one by one": lambda: torch.cat([write(model, range(i, i + 1)) for i in range(8)]),
    }
    seconds, tokens = race(options, ways)
    same = (tokens["8 questions"] == tokens["one by one"]).float().mean().item()
    return {"cost of 8 questions": seconds["8 questions"] / seconds["one question"], "share of same tokens": same}


def data(options: argparse.Namespace) -> dict[str, float]:
    """The loader on video shards and on precomputed ones, to the GPU if there is one, against decord itself.

    By default each has one process of one thread.
    """
    if options.clips % options.batch_size:
        raise SystemExit(f"--clips {options.clips}: expected a multiple of --batch-size")
    given: dict[str, Any] = {"num_train_clips": options.clips, "num_val_clips": 1, "batch_size": options.batch_size}
    given |= {"num_workers": options.workers, **asdict(Bucket.parse(options.size))}

    def loader(precompute: bool) -> TrainLoader:
        module = VideoTextDataModule(root="runs/data/benchmark", precompute=precompute, **given)
        module.prepare_data()
        module.setup("fit")
        return module.train_dataloader()

    def read(batches: TrainLoader) -> int:
        return sum(len(move_data_to_device(batch, this_device())["key"]) for batch in batches)

    videos, latents = loader(precompute=False), loader(precompute=True)
    with SpawnPool(1) as pool:
        ways: Ways = {
            "decord": lambda: pool.submit(read_bare, videos.dataset.refs).result(),
            "loader, videos": lambda: read(videos),
            "loader, latents": lambda: read(latents),
        }
        seconds, clips = race(options, ways, options.clips)
    assert set(clips.values()) == {options.clips}
    return {
        "speed on videos, against decord": seconds["decord"] / seconds["loader, videos"],
        "speed on latents, against videos": seconds["loader, videos"] / seconds["loader, latents"],
    }


def read_bare(refs: list[SampleRef]) -> int:
    """Decode all frames of these clips with decord; returns the number of clips."""
    import decord

    for ref in refs:
        reader = decord.VideoReader(io.BytesIO(ref.read("mp4")), num_threads=1)
        reader.get_batch(range(len(reader))).asnumpy()
    return len(refs)


OPTIONS: dict[Callable[[argparse.Namespace], dict[str, float]], dict[str, Any]] = {
    caption: {"frames": 5, "text-tokens": 64, "steps": 50, "repeats": 3},
    questions: {"frames": 15, "text-tokens": 32, "steps": 8, "repeats": 3},
    data: {"size": "480x832x33", "clips": 16, "batch-size": 1, "workers": 1, "repeats": 5},
}
"""Options of each command, with their defaults."""


def main(args: list[str] | None = None) -> dict[str, float]:
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for function, defaults in OPTIONS.items():
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(measure=function)
        for option, default in defaults.items():
            command.add_argument(f"--{option}", type=type(default), default=default)
    options = parser.parse_args(args)
    ratios = options.measure(options)
    for name, value in ratios.items():
        print(f"{name}: {value:.4g}")
    return ratios


if __name__ == "__main__":
    main()
