"""Make what benchmarks outside of this project score: videos for VBench, captions for DREAM-1K.

    python tools/evaluate.py vbench --prompts VBench_full_info.json --model my_model --output runs/vbench
    python tools/evaluate.py dream1k --videos DREAM-1K/video --annotations DREAM-1k.jsonl --model my_model \
        --output runs/dream1k
    python tools/evaluate.py vbench --engine ray ...        # the work is divided among the GPUs, here or of a cluster

The same command again continues an interrupted run and retries failed items; docs/EVALUATION.md says how to call the
scorers.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from univigu.cli import ToolParser, exit_code
from univigu.data.engine import add_engine, open_engine
from univigu.data.options import add_options, read_options
from univigu.evaluation.caption_export import export_dream1k
from univigu.evaluation.exports import CAPTION_ONLY, VIDEO_ONLY, ExportOptions
from univigu.evaluation.vbench import export_vbench
from univigu.sampling.options import SamplingOptions


def parser() -> argparse.ArgumentParser:
    top = ToolParser(description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    vbench = commands.add_parser("vbench", help="{prompt}-{index}.mp4 for every prompt")
    vbench.add_argument("--prompts", required=True, help="VBench_full_info.json, .txt, .jsonl, .json, .csv or .parquet")
    vbench.add_argument("--augmented", help="file of as many longer prompts to make the videos of, in the same order")
    add_options(vbench, ExportOptions(), CAPTION_ONLY)
    captions = commands.add_parser("dream1k", help="captions for tarsier")
    captions.add_argument("--videos", nargs="+", required=True, help="files, folders or patterns")
    captions.add_argument("--annotations", required=True, help="the benchmark's list: .jsonl or .json")
    add_options(captions, ExportOptions(), VIDEO_ONLY)
    s = SamplingOptions()
    captions.add_argument("--caption-steps", type=int, default=s.caption_steps, help="denoising steps of the text")
    captions.add_argument("--text-order", default=s.text_order, help="random or confidence (mask flow)")
    captions.add_argument("--temperature", type=float, default=s.temperature)
    for command in commands.choices.values():
        command.add_argument("--model", required=True, help="folder of a pipeline (tools/convert.py pipeline)")
        command.add_argument("--output", type=Path, required=True, help="folder of the run")
        add_engine(command)
    return top


def run(o: argparse.Namespace) -> None:
    engine, device = open_engine(o)
    common: dict[str, Any] = {"engine": engine, "device": device}
    if o.command == "vbench":
        rows = export_vbench(o.output, o.model, o.prompts, o.augmented, read_options(ExportOptions, o), **common)
    else:
        sampling = SamplingOptions(caption_steps=o.caption_steps, text_order=o.text_order, temperature=o.temperature)
        options = read_options(ExportOptions, o, sampling=sampling)
        rows = export_dream1k(o.output, o.model, o.videos, o.annotations, options, **common)
    failed = [row for row in rows if row["error"] is not None]
    print(f"{o.output}: complete: {len(rows)} rows, {len(failed)} of them errors")
    for row in failed[:10]:
        line = f"  {row.get('key', row.get('video'))}: {row['error']}"
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)  # file names may be invalid Unicode
    if len(failed) == len(rows):
        raise SystemExit(f"error: {o.output}: no input could be used")


def main(args: list[str] | None = None) -> int:
    options = parser().parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
