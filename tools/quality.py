"""Measure edits of the embedded world's held-out clips with the checkers: what changes, what stays.

    python tools/quality.py edit --model my_model --splits val test

``--model`` is a UniViGUPipeline folder (tools/convert.py pipeline) trained on the embedded world; without it the model
that ships is measured.  The clips have combinations that training never shows.  ``lightning test`` measures the rest.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from univigu.cli import ToolParser
from univigu.data.engine import this_device
from univigu.data.progress import track
from univigu.data.video import to_uint8
from univigu.flow.random import Generators
from univigu.models.tokens import replace_words
from univigu.pipeline import UniViGUPipeline
from univigu.shapes.metrics import score
from univigu.shapes.renderer import render
from univigu.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, sample_scene
from univigu.shapes.text_checker import brief_of
from univigu.shapes.texts import prompt_of
from univigu.shapes.video_checker import detect

BATCH = 32
EDITED = {"color": list(COLORS), "shape": list(SHAPES), "size": list(SIZES), "background": list(BACKGROUNDS)}


def changed(scene: Scene, attribute: str, seed: int) -> tuple[Scene, str, str]:
    """The scene with another value of one attribute of its first object (or of the background), drawn from the seed.

    The other object's colour is not used, because prompts tell objects apart by colour.  Also returned are the words of
    a prompt that the change replaces, and the new ones.
    """
    first, *others = scene.objects
    taken = {scene.background if attribute == "background" else getattr(first, attribute)}
    if attribute == "color":
        taken |= {other.color for other in others}
    free = [value for value in EDITED[attribute] if value not in taken]
    value = free[int(torch.randint(len(free), (1,), generator=torch.Generator().manual_seed(seed)))]
    if attribute == "background":
        return replace(scene, background=value), f"{scene.background} background", f"{value} background"
    change: dict[str, Any] = {attribute: value}
    other = replace(first, **change)
    old, new = (f"{obj.size} {obj.color} {obj.shape}" for obj in (first, other))
    return replace(scene, objects=(other, *others)), old, new


def batches(scenes: list[Scene]) -> Iterator[tuple[range, torch.Tensor, Generators]]:
    """Numbers of scenes, their videos and a generator for each."""
    for start in range(0, len(scenes), BATCH):
        numbers = range(len(scenes))[start : start + BATCH]
        video = torch.stack([render(scenes[i]) for i in numbers]).float() / 255
        yield numbers, video, [torch.Generator().manual_seed(i) for i in numbers]


def edit_row(
    pipe: UniViGUPipeline, scenes: list[Scene], texts: list[str], attribute: str, strength: float, steps: int
) -> list[float]:
    """Shares of edits that show the change, of other attributes kept, and of first objects whose start is kept."""
    shown, kept, starts = [], [], []
    sampling: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
    for numbers, video, generators in batches(scenes):
        targets, prompts = [], []
        for i in numbers:
            target, old, new = changed(scenes[i], attribute, i)
            targets.append(target)
            prompts.append(replace_words(texts[i], {old: new}) if old in texts[i] else texts[i])
        made = pipe.edit(video, prompts, strength, generator=generators, **sampling)
        for clip, target in zip(to_uint8(made.frames), targets, strict=True):
            result = score(detect(clip), target)
            shown.append(result[attribute])
            kept += [value for name, value in result.items() if name not in (attribute, "start", "end")]
            starts.append(result["start"])
    return [fmean(values) for values in (shown, kept, starts)]


def run(options: argparse.Namespace) -> None:
    if options.clips < 1:
        raise ValueError(f"--clips {options.clips}: expected at least 1")
    pipe = UniViGUPipeline.from_pretrained(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    scenes = [sample_scene(seed, split) for split in options.splits for seed in range(options.clips)]
    texts = list(map(prompt_of, scenes))
    if options.prompts == "own":
        outputs = [pipe.caption(video, generator=generators) for _, video, generators in batches(scenes)]
        texts = [brief_of(text) for output in outputs for text in output.text or []]
    title = f"edits, {options.prompts} prompts, {options.num_inference_steps} steps"
    table = Table("changed", "strength", "change shown", "others kept", "start kept", title=title)
    for attribute, strength in track([(name, strength) for strength in options.strength for name in EDITED]):
        shares = edit_row(pipe, scenes, texts, attribute, strength, options.num_inference_steps)
        table.add_row(attribute, f"{strength:g}", *(f"{100 * share:.1f}" for share in shares))
    Console(width=110).print(table)


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("task", choices=["edit"], help="one attribute of a clip is changed at a time")
    parser.add_argument("--model", type=Path, help="UniViGUPipeline folder; default: the model that ships")
    parser.add_argument("--splits", nargs="+", choices=["val", "test"], default=["test"])
    parser.add_argument("--clips", type=int, default=64, help="of each split")
    parser.add_argument("--device", default=this_device())
    parser.add_argument("--strength", type=float, nargs="+", default=[0.8])
    parser.add_argument("--prompts", choices=["own", "true"], default="own", help="read by the model, or of the scenes")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    return parser.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
