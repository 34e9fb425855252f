"""Use a model in the browser: generate, caption, joint and edit, with the steps of every sample.

pip install -e ".[demo]"
python tools/convert.py pipeline --checkpoint runs/refine/checkpoints/last.ckpt --output my_model
python tools/demo.py --model my_model
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch

from univigu.cli import ToolParser, exit_code
from univigu.demo import Demo, DemoOptions, build
from univigu.pipeline import TaskRunner, UniViGUPipeline


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="UniViGUPipeline folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network")
    parser.add_argument("--port", type=int, default=7860)
    for field in fields(DemoOptions):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    return parser.parse_args(args)


def run(options: argparse.Namespace) -> None:
    demo_options = DemoOptions(**{field.name: getattr(options, field.name) for field in fields(DemoOptions)})
    pipe = UniViGUPipeline.from_pretrained(options.model, torch_dtype=getattr(torch, options.dtype))
    demo = Demo(pipe.to(options.device), demo_options)
    tasks = TaskRunner(pipe, pipe.transformer, lambda: pipe.scheduler)
    tasks.latents_shape(options.height, options.width, options.num_frames)  # refuses a wrong size before the page opens
    try:
        page = build(demo)
    except ModuleNotFoundError as error:
        raise ValueError(f'{error}; run pip install -e ".[demo]"') from error
    try:
        page.launch(server_name=options.host, server_port=options.port, allowed_paths=[str(demo.folder)])
    finally:
        page.close()  # removes gradio's copies of videos


def main(args: list[str] | None = None) -> int:
    options = parse(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
