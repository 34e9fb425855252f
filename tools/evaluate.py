"""Make the videos that VBench scores.

    python tools/evaluate.py vbench --prompts VBench_full_info.json --model my_model --output runs/vbench
    python tools/evaluate.py vbench --engine ray ...        # the work is divided among the GPUs, here or of a cluster

The same command again continues an interrupted run; docs/EVALUATION.md says how to call the scorer.
"""

import argparse
import sys
from pathlib import Path

from univigu.cli import ToolParser
from univigu.data.engine import add_engine, open_engine
from univigu.data.options import add_options, read_options
from univigu.evaluation.vbench import ExportOptions, export_vbench


def run(o: argparse.Namespace) -> None:
    engine, device = open_engine(o)
    rows = export_vbench(o.output, o.model, o.prompts, o.augmented, read_options(ExportOptions, o), engine, device)
    failed = [row for row in rows if row["error"] is not None]
    print(f"{o.output}: complete: {len(rows)} rows, {len(failed)} of them errors")
    for row in failed[:10]:
        line = f"  {row['video']}: {row['error']}"
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)  # prompts may be invalid Unicode
    if len(failed) == len(rows):
        raise SystemExit(f"error: {o.output}: no input could be used")


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("benchmark", choices=["vbench"], help="{prompt}-{index}.mp4 for every prompt")
    parser.add_argument("--prompts", required=True, help="VBench_full_info.json, .txt, .jsonl, .json, .csv or .parquet")
    parser.add_argument("--augmented", help="file of as many longer prompts to make the videos of, in the same order")
    parser.add_argument("--model", required=True, help="folder of a pipeline (tools/convert.py pipeline)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    add_options(parser, ExportOptions())
    add_engine(parser)
    return parser.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
