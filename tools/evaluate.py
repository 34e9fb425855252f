"""Make what benchmarks outside of this project score: videos for VBench, captions for DREAM-1K and VDC.

    python tools/evaluate.py vbench --prompts VBench_full_info.json --model my_model --output runs/vbench
    python tools/evaluate.py dream1k --videos DREAM-1K/video --annotations DREAM-1k.jsonl --model my_model \
        --output runs/dream1k
    python tools/evaluate.py vdc --videos VDC/videos --category detailed --model my_model --output runs/vdc
    torchrun --nproc-per-node 8 tools/evaluate.py ...       # the work is divided among the processes

The same command again goes on where it was cut off, and tries again what failed; docs/EVALUATION.md tells more, also
how the scorers are then called.  What can be measured without them ``lightning test`` logs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any, get_args

from univigu.cli import exit_code
from univigu.data.build import Share, this_device
from univigu.evaluation.caption_export import CaptionerOptions, Category, export_dream1k, export_vdc
from univigu.evaluation.vbench import VBenchOptions, export_vbench
from univigu.sampling.options import SamplingOptions


def parser() -> argparse.ArgumentParser:
    """The subcommands and their options; defaults are those of the dataclasses."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)

    v, vbench = VBenchOptions(), commands.add_parser("vbench", help="{prompt}-{index}.mp4 for every prompt")
    vbench.add_argument("--prompts", required=True, help="VBench_full_info.json, or .txt, .jsonl or .parquet (prompt)")
    vbench.add_argument("--augmented", help="file of as many longer prompts to make the videos of, in the same order")
    vbench.add_argument("--samples", type=int, default=v.samples, help="videos a prompt; 25 for temporal flickering")
    vbench.add_argument("--fps", type=int, default=v.fps, help="frames a second; 16 for Wan2.1")
    vbench.add_argument("--steps", type=int, default=v.steps, help="denoising steps")
    vbench.add_argument("--guidance-scale", type=float, default=v.guidance_scale)
    vbench.add_argument("--negative-prompt", default=v.negative_prompt, help="default: the null condition")

    s = SamplingOptions()
    for name, text in (
        ("dream1k", "captions for tarsier or VLMEvalKit"),
        ("vdc", "for aurora, lmms-eval or VLMEvalKit"),
    ):
        captions = commands.add_parser(name, help=text)
        captions.add_argument("--videos", nargs="+", required=True, help="files, folders or patterns")
        captions.add_argument("--annotations", required=name == "dream1k", help="the benchmark's list: .jsonl or .tsv")
        captions.add_argument("--question", default="", help="what captions are conditioned on; default: nothing")
        captions.add_argument("--caption-steps", type=int, default=s.caption_steps, help="denoising steps of the text")
        captions.add_argument("--text-order", default=s.text_order, help="random or confidence (mask flow)")
        captions.add_argument("--temperature", type=float, default=s.temperature)
    captions.add_argument("--category", choices=get_args(Category), default="detailed")
    captions.add_argument("--task", help="lmms-eval's name of the task; default: vdc_CATEGORY")

    for command in commands.choices.values():
        command.add_argument("--model", required=True, help="folder of a pipeline (tools/convert.py pipeline)")
        command.add_argument("--output", type=Path, required=True, help="folder of the run")
        command.add_argument("--height", type=int, default=v.height, help="pixels")
        command.add_argument("--width", type=int, default=v.width, help="pixels")
        command.add_argument("--num-frames", type=int, default=v.num_frames, help="4k+1")
        command.add_argument("--prompt-length", type=int, default=v.prompt_length, help="slot of prompts in tokens")
        command.add_argument("--seed", type=int, default=v.seed, help="of the first video; the others count up")
        command.add_argument("--batch-size", type=int, default=v.batch_size)
        command.add_argument("--dtype", default=v.dtype, help="float32, bfloat16 or float16")
        command.add_argument("--rank", type=int, help="number of this process; default: RANK, or srun's")
        command.add_argument("--world-size", type=int, help="number of processes; default: WORLD_SIZE, or srun's")
        command.add_argument("--device", help="default: this process's GPU if there is one, else cpu")
    return top


def run(o: argparse.Namespace) -> None:
    share = Share.from_environment(o.rank, o.world_size)
    common: dict[str, Any] = {"share": share, "device": o.device or this_device()}
    if o.command == "vbench":
        options = VBenchOptions(
            o.samples, o.seed, o.height, o.width, o.num_frames, o.fps, o.steps, o.guidance_scale, o.negative_prompt,
            o.prompt_length, o.batch_size, o.dtype,
        )  # fmt: skip
        rows = export_vbench(o.output, o.model, o.prompts, o.augmented, options, **common)
    else:
        sampling = SamplingOptions(caption_steps=o.caption_steps, text_order=o.text_order, temperature=o.temperature)
        captioner = CaptionerOptions(
            o.height, o.width, o.num_frames, o.question, o.prompt_length, o.seed, o.batch_size, o.dtype, sampling
        )
        if o.command == "dream1k":
            rows = export_dream1k(o.output, o.model, o.videos, o.annotations, captioner, **common)
        else:
            rows = export_vdc(o.output, o.model, o.videos, o.category, o.annotations, o.task, captioner, **common)
    if rows is None:
        print(f"{o.output}: this process is done, others are not")
        return
    failed = [row for row in rows if row["error"] is not None]
    print(f"{o.output}: complete: {len(rows)} rows, {len(failed)} of them errors")
    for row in failed[:10]:
        line = f"  {row.get('key', row.get('video'))}: {row['error']}"
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)  # names of files may be no text


def main(args: list[str] | None = None) -> int:
    options = parser().parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
