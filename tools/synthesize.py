"""Make training data: prompts -> clips -> detailed captions -> length filters -> shards.

    python tools/synthesize.py --prompts prompts.txt --output runs/data/mine/train
    python tools/synthesize.py --engine ray ...             # shards are divided among the GPUs, here or of a cluster

The same command again continues an interrupted run; see docs/SYNTHESIS.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Literal

from univigu.cli import ToolParser
from univigu.data.engine import add_engine, open_engine
from univigu.data.options import LengthFilter, add_options, read_options
from univigu.data.synthesis import CaptionModel, CaptionOptions, Pipeline, Synthesis, VideoOptions
from univigu.models.foundation import EMBEDDED_FOUNDATION


def run(o: argparse.Namespace) -> None:
    engine, device = open_engine(o)
    video, lengths = read_options(VideoOptions, o), read_options(LengthFilter, o)
    captions = read_options(CaptionOptions, o)
    captioner: CaptionModel | Literal["template"] | None = "template" if o.captioner == "template" else None
    if o.captioner not in ("none", "template"):
        captioner = CaptionModel(o.captioner, captions, lengths, video.dtype, device)
    synthesis = Synthesis(o.prompts, Pipeline(o.pipeline, video, device), captioner, o.tokenizer, lengths)
    manifest = synthesis.write(o.output, o.shard_size, engine)
    print(f"{o.output}: {manifest.state}")
    if manifest.complete and not manifest.counts.get("kept"):
        raise SystemExit(f"error: {o.output}: no prompt could be used")


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--prompts", required=True, help=".txt (one a line), .jsonl, .json, .csv or .parquet (prompt)")
    parser.add_argument("--pipeline", default=EMBEDDED_FOUNDATION, help="folder of a diffusers text-to-video pipeline")
    parser.add_argument("--captioner", default="template", help="none, template, or the folder of a transformers model")
    parser.add_argument("--tokenizer", help="folder of the tokenizer that counts lengths; default: the pipeline's")
    parser.add_argument("--shard-size", type=int, default=100, help="clips of a shard")
    add_engine(parser)
    add_options(parser.add_argument_group("clips"), VideoOptions())
    add_options(parser.add_argument_group("captions"), CaptionOptions())
    add_options(parser.add_argument_group("lengths, in tokens"), LengthFilter())
    return parser.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
