"""Encode shards of videos once: latents and prompt embeddings, so that training runs neither VAE nor text encoder.

    python tools/encode.py --source runs/data/mine --output runs/data/mine-encoded
    lightning fit --config configs/recall.yaml --data.shards runs/data/mine-encoded
    python tools/encode.py --engine ray ...                 # shards are divided among the GPUs, here or of a cluster

The source is a folder of shards, of videos with their texts, or of lists of these (.csv, .jsonl); or of train, val and
test, each one of those.  The same command again continues an interrupted run.  Training checks that the encoders, the
normalisation and the size are its own; see docs/DATA.md.
"""

import argparse
import sys
from pathlib import Path

from univigu.cli import ToolParser
from univigu.data.buckets import Bucket, Grid
from univigu.data.engine import SpawnPool, add_engine, open_engine
from univigu.data.index import TARS, find_split
from univigu.models.foundation import EMBEDDED_FOUNDATION


def places(source: Path) -> list[tuple[str, Path]]:
    """What below the source holds samples, and where in the output it goes: train, val and test, or all (".")."""
    splits = {name: find_split(source, name) for name in ("train", "val", "test")}
    found = [(name, path) for name, path in splits.items() if path.exists()]
    has_tars = source.is_dir() and any(path.name.lower().endswith(TARS) for path in source.iterdir())
    return found if found and not has_tars else [(".", source)]


def run(options: argparse.Namespace) -> None:
    from univigu.data.sources import encode_shards, is_large

    size = f"{options.height}x{options.width}x{options.num_frames}"
    grid, buckets = Grid.of(options.foundation), [Bucket.parse(text) for text in options.buckets or [size]]
    for bucket in buckets:
        grid.latents_shape(bucket, f"size {bucket}: ")
    engine, device = open_engine(options, processes=True)
    prompts, workers = not options.no_prompts, options.workers
    if workers is None and prompts and is_large(options.foundation, "text_encoder"):
        workers = 1
    with SpawnPool(workers) as pool:
        if engine is map and device == "cpu" and pool.workers > 1:
            engine = pool.map
        for name, source in places(options.source):
            target, more = options.output / name, (options.strict, engine, prompts, device)
            manifest = encode_shards(source, target, options.foundation, options.dtype, buckets, *more)
            print(f"{target}: {manifest.state}")
            if not manifest.counts["kept"]:
                raise SystemExit(f"error: {source}: no sample could be used")


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="folder of video shards, or of such folders")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--foundation", default=EMBEDDED_FOUNDATION, help="WanPipeline folder with the encoders")
    parser.add_argument("--dtype", default="float32", help="how results are stored: float32, bfloat16 or float16")
    parser.add_argument("--height", type=int, default=64, help="pixels; videos are scaled and cropped")
    parser.add_argument("--width", type=int, default=64, help="pixels")
    parser.add_argument("--num-frames", type=int, default=9, help="4k+1 for Wan, spread evenly over the clip")
    parser.add_argument("--buckets", nargs="+", metavar="HxWxF", help="several sizes: 480x832x81 832x480x81 ...")
    parser.add_argument("--no-prompts", action="store_true", help="latents alone; prompts are then encoded in training")
    parser.add_argument("--strict", action="store_true", help="stop at the first sample that cannot be encoded")
    add_engine(parser)  # --workers are local processes, too: one a core, if memory holds as many encoders
    return parser.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
