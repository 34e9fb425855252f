"""Measure training, captions and videos on one device: the GPU table of docs/BENCHMARKS.md.

    python tools/gpu_report.py                                               # Wan2.1 1.3B at 480x832x81, one H100
    python tools/gpu_report.py --size small --only "train step, paper"       # a step of both modalities on a CPU

The weights are random, which does not change the times.  Rows are printed as lines of JSON, failures with their error.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKLWan

from univigu.cli import ToolParser
from univigu.data.engine import this_device
from univigu.flow.objective import TaskMixture, UniFlowBatch, UniFlowObjective
from univigu.flow.text import make_text_flow
from univigu.models.foundation import Foundation
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.sampling.options import SamplingOptions
from univigu.sampling.sampler import SampleInputs, Sampler, Task
from univigu.training.optim import freeze_by_rate
from univigu.training.plan import UMT5_VOCAB_SIZE, WAN21, Workload, count_step
from univigu.training.stages import Stage

FROZEN = yaml.safe_load((Path(__file__).parents[1] / "configs" / "frozen.yaml").read_text())
RECIPES: dict[str, dict[str, Any]] = {"paper": {"text_flow": "uniform"}, "frozen": FROZEN["model"]["architecture"]}
LONG, SHORT, VIDEO = 50, 8, 20  # steps of two captions and of a video
NOMINAL_TFLOPS = 989.0
"""Dense bfloat16 rate of the H100 and H200 (SXM), by their data sheets."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is measured."""

    transformer: dict[str, Any]
    vocab_size: int
    latents: tuple[int, int, int, int]  # channels, frames, height, width of a clip's
    prompt_length: int
    text_length: int
    vae: dict[str, Any]


SMALL = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 4, "text_dim": 64}
SMALL_VAE = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
SIZES = {
    "1.3b": Size(WAN21["Wan2.1-T2V-1.3B"], UMT5_VOCAB_SIZE, (16, 21, 60, 104), 512, 256, {}),
    "small": Size(SMALL, 4096, (16, 5, 60, 52), 64, 32, SMALL_VAE),  # Wan's proportion of the tokens
}


class Report:
    """Measures and prints rows."""

    def __init__(self, device: torch.device, size: str, only: str) -> None:
        self.device, self.size, self.only = device, SIZES[size], only
        self.rows: list[Row] = []
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(json.dumps({"device": name, "torch": torch.__version__, "size": size}), flush=True)

    def row(self, name: str, measure: Callable[[], Row]) -> None:
        """Measure one row, if it is asked for; its error is recorded instead of raised."""
        if not name.startswith(self.only):
            return
        cuda = self.device.type == "cuda"
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            result = measure()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
        if cuda:
            result["peak_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        self.rows.append({"name": name, **result})
        print(json.dumps(self.rows[-1]), flush=True)

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
        text = {"vocab_size": self.size.vocab_size, "text_length": self.size.text_length}
        return {**self.size.transformer, **RECIPES[recipe], **text}

    def model(self, recipe: str, dtype: torch.dtype) -> UniViGUTransformer3DModel:
        with torch.device(self.device):
            model = UniViGUTransformer3DModel(**self.config(recipe))
        for parameter in model.parameters():  # also those that diffusers keeps in float32
            parameter.data = parameter.data.to(dtype)
        return model

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, prompt embeddings and the null condition of one clip."""
        shapes = (1, *self.size.latents), (1, self.size.prompt_length, self.size.transformer["text_dim"])
        latents, embeds = (torch.randn(shape, device=self.device) for shape in shapes)
        return latents, embeds, torch.zeros_like(embeds)

    # ------------------------------------------------------------------------ rows

    def matrix_product(self) -> Row:
        """The rate of a large bfloat16 product of random matrices."""
        size = 8192 if self.device.type == "cuda" else 256
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return {"tflops": round(2e-12 * size**3 / self.seconds(lambda: a @ b, 10, 3), 3)}

    def train(self, recipe: str) -> None:
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
        objective = UniFlowObjective(make_text_flow(model.config.text_flow, self.size.vocab_size))
        ids = torch.randint(self.size.vocab_size, (1, self.size.text_length), device=self.device)
        batch = UniFlowBatch(*self.inputs(), ids)

        def step(counts: tuple[int, int, int]) -> None:
            with torch.autocast(self.device.type, torch.bfloat16):
                losses = objective(model, batch, counts)
            losses.total(1).backward()
            optimizer.step()
            optimizer.zero_grad()

        def measure(counts: tuple[int, int, int]) -> Row:
            seconds = self.seconds(lambda: step(counts))
            stage = Stage(text_length=self.size.text_length, learning_rate=rates["video"], tasks=TaskMixture(*counts))
            work = Workload(self.config(recipe), self.size.latents, self.size.prompt_length, stage)
            rate = count_step(work, False)[0] / seconds / 1e12
            return {"seconds": round(seconds, 4), "tflops": round(rate, 3), "mfu": round(rate / NOMINAL_TFLOPS, 4)}

        for task, counts in tasks.items():
            self.row(f"train step, {recipe}, {task}", partial(measure, counts))

    def sample(
        self, model: UniViGUTransformer3DModel, task: Task, runs: tuple[int, int] = (2, 1), **options: Any
    ) -> Row:
        """Seconds of a caption, or of denoising a video; ``runs`` are the timed ones and those before them."""
        sampler = Sampler(model, Foundation().scheduler(), SamplingOptions(**options))
        latents, embeds, null = self.inputs()
        inputs = SampleInputs(embeds, null, shape=self.size.latents)
        if task == "caption":
            inputs = SampleInputs(null, null, latents, text_length=self.size.text_length)
        return {"seconds": round(self.seconds(lambda: sampler.sample(task, inputs), *runs), 4), **options}

    def samples(self) -> None:
        """Captions without the cache, with it, in bfloat16, compiled; a video under guidance (two passes a step)."""
        model = self.model("paper", torch.bfloat16).eval()

        def caption(name: str, steps: int, **options: Any) -> None:
            self.row(f"caption, {name}", lambda: self.sample(model, "caption", caption_steps=steps, **options))

        caption("paper, bfloat16, no cache", SHORT, runs=(1, 1))
        caption("paper, bfloat16, no cache", LONG, runs=(1, 0))
        caption("paper, bfloat16, cache of the first pass", LONG, caption_refresh=LONG)
        model = self.model("frozen", torch.float32).eval()
        caption("frozen, float32, exact cache", SHORT, runs=(1, 1))
        model = self.model("frozen", torch.bfloat16).eval()
        caption("frozen, bfloat16, exact cache", LONG)
        caption("frozen, bfloat16, exact cache", SHORT)
        model.compile_repeated_blocks()
        caption("frozen, bfloat16, compiled", LONG)
        caption("frozen, bfloat16, compiled", SHORT)
        guided = {"num_inference_steps": VIDEO, "guidance_scale": 5.0}
        self.row("video, bfloat16, compiled", lambda: self.sample(model, "generate", (1, 0), **guided))

    @torch.no_grad()
    def vae(self) -> None:
        """Encoding and decoding one clip with Wan2.1's VAE."""
        _, frames, height, width = self.size.latents
        for dtype in (torch.float32, torch.bfloat16):
            with torch.device(self.device):
                vae = AutoencoderKLWan(**self.size.vae).to(dtype).eval()
                clip = torch.zeros(1, 3, 4 * frames - 3, 8 * height, 8 * width, dtype=dtype)
                latents = torch.randn(1, *self.size.latents, dtype=dtype)
            for name, call in (("encodes", partial(vae.encode, clip)), ("decodes", partial(vae.decode, latents))):
                row = f"VAE {name} a clip, {str(dtype).removeprefix('torch.')}"
                self.row(row, lambda call=call: {"seconds": round(self.seconds(call, 1), 3)})  # type: ignore[misc]


def main(args: list[str] | None = None) -> list[Row]:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    parser.add_argument("--device", default=this_device())
    parser.add_argument("--only", default="", help="how the names of the rows to measure begin")
    options = parser.parse_args(args)
    torch.manual_seed(0)
    report = Report(torch.device(options.device), options.size, options.only)
    report.row("matrix product, bfloat16", report.matrix_product)
    for recipe in RECIPES:
        report.train(recipe)
    report.samples()
    report.vae()
    return report.rows


if __name__ == "__main__":
    main()
