"""Measure training, captions, videos and the loader on one GPU: the GPU table of docs/BENCHMARKS.md.

    python tools/gpu_report.py --output report.json                 # Wan2.1 1.3B at 480x832x81, one H100, 8 minutes
    python tools/gpu_report.py --output report.json --size tiny     # the same rows on a CPU, in seconds

The weights are random, which does not change the times.  The file is written after every row, so a run that is cut off
still reports; a row that fails records its error.  A bare machine needs these packages besides torch, lightning,
transformers, accelerate, torchmetrics, einops and safetensors: diffusers, peft, jsonargparse, docstring_parser,
typeshed_client, ftfy, wcwidth, av, filelock, and torchao for the FP8 rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

from univigu.flow.objective import TaskMixture, UniFlowBatch, UniFlowObjective
from univigu.flow.text import make_text_flow
from univigu.models import UniViGUTransformer3DModel
from univigu.sampling.options import SamplingOptions
from univigu.sampling.sampler import Sampler
from univigu.training.optim import freeze_by_rate
from univigu.training.plan import UMT5_VOCAB_SIZE, WAN21, Workload, step_flops
from univigu.training.stages import Stage

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"text_flow": "uniform"},
    "frozen": {
        "text_flow": "mask",
        "text_positions": 256,
        "text_attention": "own",
        "clean_video_reads_text": False,
        "clean_video_timestep": 300,
    },
}
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2, "text_dim": 32}
NOMINAL_TFLOPS = 989.0
"""Dense bfloat16 rate of the H100 and H200 (SXM), by their data sheets."""
Row = dict[str, Any]


class Report:
    """Rows measured so far, in a file that is rewritten after each of them."""

    def __init__(self, path: Path, device: torch.device, size: str, budget: float) -> None:
        self.path, self.device, self.start, self.budget = path, device, time.perf_counter(), budget
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        self.content: dict[str, Any] = {"device": name, "torch": torch.__version__, "commit": commit.stdout.strip()}
        self.content |= {"size": size, "rows": []}

    def row(self, name: str, measure: Callable[[], Row]) -> None:
        """Measure one row; its error, or that the time is up, is recorded instead."""
        elapsed, cuda = time.perf_counter() - self.start, self.device.type == "cuda"
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            if elapsed > self.budget:
                raise TimeoutError(f"not measured: {elapsed:.0f} s had passed")
            result = measure()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
        if cuda:
            result["peak_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        row = {"name": name, **result, "row_seconds": round(time.perf_counter() - self.start - elapsed, 1)}
        self.content["rows"].append(row)
        self.path.write_text(json.dumps(self.content, indent=1))
        print(json.dumps(row), flush=True)


class Bench:
    """The sizes of what is measured, and how one row is measured."""

    def __init__(self, size: str, device: torch.device) -> None:
        self.device, self.tiny = device, size == "tiny"
        self.transformer = dict(TINY if self.tiny else WAN21["Wan2.1-T2V-1.3B"])
        self.vocab_size = 512 if self.tiny else UMT5_VOCAB_SIZE
        self.latents = (16, 2, 8, 8) if self.tiny else (16, 21, 60, 104)
        self.pixels = (64, 64, 5) if self.tiny else (480, 832, 81)
        self.prompt_length, self.text_length = (8, 16) if self.tiny else (512, 256)
        self.many, self.few, self.video_steps = (4, 2, 2) if self.tiny else (50, 8, 20)

    def seconds(self, run: Callable[[], Any], repeats: int = 3, warmup: int = 1) -> float:
        """Median seconds of a call."""
        times = []
        for _ in range(warmup + repeats):
            start = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[warmup:])

    def config(self, recipe: str) -> dict[str, Any]:
        return {**self.transformer, **RECIPES[recipe], "vocab_size": self.vocab_size, "text_length": self.text_length}

    def model(self, recipe: str, dtype: torch.dtype) -> UniViGUTransformer3DModel:
        with torch.device(self.device):
            model = UniViGUTransformer3DModel(**self.config(recipe))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, prompt embeddings and the null condition of one clip."""
        shapes = (1, *self.latents), (1, self.prompt_length, self.transformer["text_dim"])
        latents, embeds = (torch.randn(shape, device=self.device) for shape in shapes)
        return latents, embeds, torch.zeros_like(embeds)

    def compile(self, model: UniViGUTransformer3DModel) -> None:
        for block in model.blocks:
            block.compile(backend="eager" if self.tiny else "inductor")

    # ------------------------------------------------------------------------ rows

    def matrix_product(self) -> Row:
        """The rate of a large bfloat16 product of random matrices."""
        size = 8192 if self.device.type == "cuda" else 256
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return {"tflops": round(2e-12 * size**3 / self.seconds(lambda: a @ b, 10, 3), 1)}

    def train(self, report: Report, recipe: str) -> None:
        """A step of each task: float32 weights, bfloat16 autocast, AdamW, checkpointed blocks, one clip."""
        frozen = recipe == "frozen"
        # Nothing of a frozen generator learns from the generate share.
        tasks = {"joint": (1, 0, 0), "understand": (0, 1, 0)} | ({} if frozen else {"generate": (0, 0, 1)})
        rates = {"video": 0.0 if frozen else 1e-5, "text": 1e-4}
        model = self.model(recipe, torch.float32).train()
        model.enable_gradient_checkpointing()
        freeze_by_rate(model, None, rates)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        objective = UniFlowObjective(make_text_flow(model.config.text_flow, self.vocab_size))
        ids = torch.randint(self.vocab_size, (1, self.text_length), device=self.device)
        batch = UniFlowBatch(*self.inputs(), ids)

        def measure(counts: tuple[int, int, int]) -> Row:
            def step() -> None:
                with torch.autocast(self.device.type, torch.bfloat16):
                    losses = objective(model, batch, counts)
                losses.total(1).backward()
                optimizer.step()
                optimizer.zero_grad()

            seconds = self.seconds(step)
            stage = Stage(text_length=self.text_length, learning_rate=rates["video"], tasks=TaskMixture(*counts))
            work = Workload(self.config(recipe), self.latents, self.prompt_length, stage)
            rate = step_flops(work, False) / seconds / 1e12
            return {"seconds": round(seconds, 4), "tflops": round(rate, 1), "mfu": round(rate / NOMINAL_TFLOPS, 4)}

        for task, counts in tasks.items():
            report.row(f"train step, {recipe}, {task}", lambda counts=counts: measure(counts))  # type: ignore[misc]

    def sampler(self, model: UniViGUTransformer3DModel, **options: Any) -> Sampler:
        scheduler = UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
        return Sampler(model, scheduler, SamplingOptions(**options))

    def caption(self, model: UniViGUTransformer3DModel, steps: int, refresh: int = 1, repeats: int = 2) -> Row:
        """Seconds of a caption; a single repeat of many steps has no warm-up."""
        (latents, _, null), sampler = self.inputs(), self.sampler(model, caption_steps=steps, caption_refresh=refresh)
        warmup = 0 if repeats == 1 and steps == self.many else 1
        seconds = self.seconds(lambda: sampler.caption(latents, null, self.text_length), repeats, warmup)
        return {"seconds": round(seconds, 4), "steps": steps}

    def video(self, model: UniViGUTransformer3DModel) -> Row:
        """Seconds of a video's denoising under guidance (two passes a step), without decoding."""
        sampler = self.sampler(model, num_inference_steps=self.video_steps, guidance_scale=5.0)
        _, embeds, null = self.inputs()
        seconds = self.seconds(lambda: sampler.generate(embeds, null, self.latents), 1, 0)
        return {"seconds": round(seconds, 3), "steps": self.video_steps}

    def samples(self, report: Report) -> None:
        """Captions without the cache, with it, in bfloat16, compiled; a video."""
        many, few = self.many, self.few
        model = self.model("paper", torch.bfloat16).eval()
        report.row("caption, paper, bfloat16, no cache", lambda: self.caption(model, few, repeats=1))
        report.row("caption, paper, bfloat16, no cache", lambda: self.caption(model, many, repeats=1))
        report.row("caption, paper, bfloat16, cache of the first pass", lambda: self.caption(model, many, many))
        model = self.model("frozen", torch.float32).eval()
        report.row("caption, frozen, float32, exact cache", lambda: self.caption(model, few, repeats=1))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        for name in ("exact cache", "compiled"):
            if name == "compiled":
                self.compile(model)
            for steps in (many, few):
                row = f"caption, frozen, bfloat16, {name}"
                report.row(row, lambda steps=steps: self.caption(model, steps))  # type: ignore[misc]
        report.row("video, bfloat16, compiled", lambda: self.video(model))

    def fp8(self, report: Report) -> None:
        """FP8 weights and activations in the blocks, by torchao; compiling takes minutes, so these rows are last."""
        torch.compiler.reset()
        model = self.model("frozen", torch.bfloat16).eval()

        def quantized() -> Row:
            from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

            quantize_(model.blocks, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
            self.compile(model)
            return self.caption(model, self.many)

        report.row("caption, frozen, FP8, compiled", quantized)
        report.row("caption, frozen, FP8, compiled", lambda: self.caption(model, self.few))
        report.row("video, FP8, compiled", lambda: self.video(model))

    @torch.no_grad()
    def vae(self, report: Report) -> None:
        """Encoding and decoding one clip with Wan2.1's VAE."""
        small: dict[str, Any] = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} if self.tiny else {}
        height, width, frames = self.pixels
        for dtype in (torch.float32, torch.bfloat16):
            with torch.device(self.device):
                vae = AutoencoderKLWan(**small).to(dtype).eval()
                clip, latents = torch.zeros(1, 3, frames, height, width), torch.randn(1, *self.latents)
            for name, run, value in (("encodes", vae.encode, clip), ("decodes", vae.decode, latents)):
                call = partial(run, value.to(dtype))
                report.row(f"VAE {name} a clip, {str(dtype).removeprefix('torch.')}", partial(self.timed, call))

    def timed(self, call: Callable[[], Any]) -> Row:
        return {"seconds": round(self.seconds(call, 1), 3)}

    def loader(self, folder: Path) -> Row:
        """Clips a second from shards of latents to the device, at the size that is trained on."""
        from univigu.data.buckets import Bucket
        from univigu.data.datamodule import VideoTextDataModule
        from univigu.data.encode import encode_shards
        from univigu.models.foundation import EMBEDDED_FOUNDATION
        from univigu.shapes.write import write_shapes

        height, width, frames = self.pixels
        size, clips, workers = {"height": height, "width": width, "num_frames": frames}, 8, 0 if self.tiny else 4
        for split, count in (("train", clips), ("val", 1)):
            videos, latents = folder / "videos" / split, folder / "latents" / split
            write_shapes(videos, split, count, shard_size=2, **size)  # type: ignore[arg-type]
            bucket = Bucket(height, width, frames)
            encode_shards(videos, latents, EMBEDDED_FOUNDATION, buckets=[bucket], device=str(self.device))
        data = VideoTextDataModule(
            shards=str(folder / "latents"), precompute=False, batch_size=1, num_workers=workers, **size
        )
        data.setup("fit")
        loader, moved = data.train_dataloader(), 0

        def drain() -> None:
            nonlocal moved
            for batch in loader:
                moved = batch["latents"].to(self.device, non_blocking=True).nbytes

        return {"clips_a_second": round(clips / self.seconds(drain), 1), "bytes_a_clip": moved, "workers": workers}


def main(args: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_report.json"))
    parser.add_argument("--size", choices=["1.3b", "tiny"], default="1.3b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which no row is begun")
    parser.add_argument("--folder", type=Path, default=Path("runs/data/gpu_report"), help="where the loader's clips go")
    options = parser.parse_args(args)
    torch.manual_seed(0)
    bench = Bench(options.size, torch.device(options.device))
    report = Report(options.output, bench.device, options.size, options.budget)
    report.row("matrix product, bfloat16", bench.matrix_product)
    for recipe in RECIPES:
        bench.train(report, recipe)
    bench.samples(report)
    bench.vae(report)
    report.row("loader to device, latents", lambda: bench.loader(options.folder))
    bench.fp8(report)
    return report.content


if __name__ == "__main__":
    main()
