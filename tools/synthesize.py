"""Make training data: prompts -> clips -> detailed captions -> length filters -> shards.

    python tools/synthesize.py --prompts prompts.txt --output runs/data/mine/train
    python tools/synthesize.py --prompts prompts.jsonl --output data/wan/train --pipeline Wan2.1-T2V-1.3B-Diffusers \
        --captioner Qwen2.5-VL-7B-Instruct --height 480 --width 832 --num-frames 81 --fps 16 --steps 50 --dtype bfloat16
    torchrun --nproc-per-node 8 tools/synthesize.py ...     # shards are divided among the processes
    python tools/synthesize.py --source shapes --num-clips 1000 --output runs/data/world/train

The same command again goes on where it was cut off; docs/DATA.md tells more.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from univigu.cli import exit_code
from univigu.data.build import Share, this_device
from univigu.data.filters import LengthFilter
from univigu.data.synthesis.options import CaptionOptions, Source, VideoOptions
from univigu.models.foundation import EMBEDDED_FOUNDATION


def parser() -> argparse.ArgumentParser:
    """Options of the command; their defaults are those of the dataclasses."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--output", type=Path, required=True, help="folder of the shards")
    top.add_argument("--source", choices=["prompts", "shapes"], default="prompts", help="shapes: the embedded world")
    top.add_argument("--prompts", help="file of prompts: .txt (one a line), .jsonl or .parquet (field prompt)")
    top.add_argument("--num-clips", type=int, default=100, help="of the embedded world")
    top.add_argument("--split", choices=["train", "val", "test"], default="train", help="of the embedded world")
    top.add_argument("--pipeline", default=EMBEDDED_FOUNDATION, help="folder of a diffusers text-to-video pipeline")
    top.add_argument("--captioner", default="template", help="none, template, or the folder of a transformers model")
    top.add_argument("--tokenizer", help="folder of the tokenizer that lengths are counted by; default: the pipeline's")
    top.add_argument("--shard-size", type=int, default=100, help="clips a shard")
    top.add_argument("--rank", type=int, help="number of this process; default: RANK")
    top.add_argument("--world-size", type=int, help="number of processes; default: WORLD_SIZE")
    top.add_argument("--device", help="default: this process's GPU if there is one, else cpu")

    v, video = VideoOptions(), top.add_argument_group("clips")
    video.add_argument("--height", type=int, default=v.height, help="pixels, even")
    video.add_argument("--width", type=int, default=v.width, help="pixels, even")
    video.add_argument("--num-frames", type=int, default=v.num_frames, help="4k+1 for Wan")
    video.add_argument("--fps", type=int, default=v.fps, help="frames a second; 16 for Wan2.1")
    video.add_argument("--steps", type=int, default=v.steps, help="denoising steps")
    video.add_argument("--guidance-scale", type=float, default=v.guidance_scale, help="default: the pipeline's")
    video.add_argument("--negative-prompt", default=v.negative_prompt, help="default: the pipeline's")
    video.add_argument("--batch-size", type=int, default=v.batch_size, help="clips generated at once")
    video.add_argument("--videos-per-prompt", type=int, default=v.videos_per_prompt)
    video.add_argument("--seed", type=int, default=v.seed, help="of the first clip; the others count up")
    video.add_argument("--dtype", default=v.dtype, help="of the generator: float32, bfloat16 or float16")
    video.add_argument("--crf", type=int, default=v.crf, help="x264's constant rate factor")

    c, caption = CaptionOptions(), top.add_argument_group("captions")
    caption.add_argument("--frames", type=int, default=c.frames, help="frames that a language model is shown")
    caption.add_argument("--tries", type=int, default=c.tries, help="until the length is in the window")
    caption.add_argument("--caption-batch-size", type=int, default=c.batch_size, help="clips captioned at once")
    caption.add_argument("--max-new-tokens", type=int, default=c.max_new_tokens)
    caption.add_argument("--temperature", type=float, default=c.temperature)
    caption.add_argument("--top-p", type=float, default=c.top_p)
    caption.add_argument("--instruction", default=c.instruction, help="with {prompt}, {num_frames}, {words}")
    caption.add_argument("--template", default=c.template, help="with {prompt}, {num_frames}, {height}, {width}, {fps}")
    caption.add_argument("--caption-dtype", default=c.dtype, help="of the language model")

    f, lengths = LengthFilter(), top.add_argument_group("lengths, in tokens")
    lengths.add_argument("--max-prompt", type=int, default=f.max_prompt)
    lengths.add_argument("--min-caption", type=int, default=f.min_caption)
    lengths.add_argument("--max-caption", type=int, default=f.max_caption)
    return top


def run(o: argparse.Namespace) -> str:
    """What the command does; gives the line that it ends with."""
    from univigu.data.sample import DataError
    from univigu.data.synthesis.captioners import make_captioner
    from univigu.data.synthesis.run import synthesize
    from univigu.data.synthesis.sources import PromptSource, ShapesSource

    share = Share.from_environment(o.rank, o.world_size)
    device = o.device or this_device()
    video = VideoOptions(
        o.height, o.width, o.num_frames, o.fps, o.steps, o.guidance_scale, o.negative_prompt, o.batch_size,
        o.videos_per_prompt, o.seed, o.dtype, o.crf,
    )  # fmt: skip
    caption = CaptionOptions(
        o.frames, o.tries, o.caption_batch_size, o.max_new_tokens, o.temperature, o.top_p, o.instruction, o.template,
        o.caption_dtype,
    )  # fmt: skip
    lengths = LengthFilter(o.max_prompt, o.min_caption, o.max_caption)
    source: Source
    if o.source == "shapes":
        source = ShapesSource(o.num_clips, o.split, video)
    elif o.prompts is None:
        raise DataError("--prompts: expected a file of prompts (or --source shapes)")
    else:
        source = PromptSource(o.prompts, o.pipeline, video, device)
    captioner = make_captioner(o.captioner, caption, lengths, video.fps, device)
    tokenizer = o.tokenizer or str(Path(o.pipeline) / "tokenizer")
    manifest = synthesize(
        o.output, source, captioner, tokenizer, lengths, o.shard_size, video.batch_size, video.fps, video.crf, share
    )
    state = "complete" if manifest.complete else "this process is done, others are not"
    print(f"{o.output}: {state}: {len(manifest.shards)} shards, {manifest.counts}")


def main(args: list[str] | None = None) -> int:
    options = parser().parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
