"""Measure a trained model's samples on the embedded world with the checkers.

    python tools/quality.py steps --model my_model   # captions: how few denoising steps are enough
    python tools/quality.py refresh --model my_model # captions: how rarely the video may be recomputed
    python tools/quality.py edit --model my_model    # edits: what changes, what stays

``--model`` is a UniViGUPipeline folder (tools/convert.py pipeline) trained on the embedded world; without it the model
that ships is measured.  The clips are those of the test split, with combinations that training never shows.  Each
command prints a table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from univigu.cli import ToolParser, exit_code
from univigu.data.processes import this_device
from univigu.data.progress import track
from univigu.data.video import to_uint8
from univigu.models.tokens import replace_words
from univigu.pipeline import UniViGUPipeline
from univigu.sampling.options import SamplingOptions
from univigu.shapes.metrics import ShapesTextAccuracy, score
from univigu.shapes.renderer import render
from univigu.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, sample_scene
from univigu.shapes.text_checker import brief_of
from univigu.shapes.texts import prompt_of
from univigu.shapes.video_checker import detect

EDITED = {"color": list(COLORS), "shape": list(SHAPES), "size": list(SIZES), "background": list(BACKGROUNDS)}


def batches(scenes: list[Scene], size: int) -> Iterator[tuple[list[Scene], torch.Tensor, list[torch.Generator]]]:
    """Scenes, their frames in [0, 1] [B, F, C, H, W], and a generator for each."""
    for start in range(0, len(scenes), size):
        part = scenes[start : start + size]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        yield part, torch.stack([render(scene) for scene in part]).float() / 255, generators


def percents(*shares: float) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares]


def kind_of(pipe: UniViGUPipeline) -> str:
    """Which text the model was last trained to write, by the length of its text slot."""
    return "prompt" if pipe.transformer.config.text_length < 128 else "caption"


def captions(
    pipe: UniViGUPipeline, scenes: list[Scene], batch_size: int, options: SamplingOptions
) -> tuple[torch.Tensor, float, float, float, float]:
    """Caption all scenes: tokens, mean accuracy, share of exact ones, steps a batch took, seconds per clip."""
    accuracy, tokens, taken, start = ShapesTextAccuracy(kind_of(pipe)), [], 0, time.perf_counter()

    def count(pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        nonlocal taken
        taken += 1

    for part, video, generators in batches(scenes, batch_size):
        made = pipe.caption(video, generator=generators, options=options, callback_on_step_end=count)
        accuracy.update(made.text or [], part)
        tokens.append(made.tokens.cpu())  # type: ignore[union-attr]
    values = accuracy.accuracies()
    seconds = (time.perf_counter() - start) / len(scenes)
    return torch.cat(tokens), values["mean"], values["exact"], taken / len(tokens), seconds


def steps(options: argparse.Namespace, pipe: UniViGUPipeline, scenes: list[Scene]) -> Table:
    """Caption accuracy by the number of denoising steps and the order in which tokens are revealed."""
    title = f"captions ({kind_of(pipe)})"
    table = Table("order", "steps allowed", "taken", "mean", "exact", "seconds a clip", title=title)
    for order, count in track([(order, count) for order in ("random", "confidence") for count in options.steps]):
        sampling = SamplingOptions(caption_steps=count, text_order=order)
        _, mean, exact, taken, seconds = captions(pipe, scenes, options.batch_size, sampling)
        table.add_row(order, str(count), f"{taken:.1f}", *percents(mean, exact), f"{seconds:.3f}")
    return table


def refresh(options: argparse.Namespace, pipe: UniViGUPipeline, scenes: list[Scene]) -> Table:
    """Captions whose video is recomputed at every k-th step, compared with k = 1 from the same random numbers."""
    reads_text = pipe.transformer.config.clean_video_reads_text
    cache = "reads text" if reads_text else "does not read text: cached once, exactly, for any k"
    title = f"captions, {options.caption_steps} steps; clean video {cache}"
    table = Table("k", "tokens as with k = 1", "captions as with k = 1", "mean", "exact", "seconds a clip", title=title)
    pad, reference = pipe.tokenizer.pad_token_id, None
    for k in track([1, *options.refresh]):
        sampling = SamplingOptions(caption_steps=options.caption_steps, caption_refresh=k)
        ids, mean, exact, _, seconds = captions(pipe, scenes, options.batch_size, sampling)
        reference = ids if reference is None else reference
        same, counted = ids == reference, (ids != pad) | (reference != pad)  # equal padding is no agreement
        tokens, whole = same[counted].float().mean().item(), same.all(dim=1).float().mean().item()
        table.add_row(str(k), f"{100 * tokens:.2f}", *percents(whole, mean, exact), f"{seconds:.3f}")
    return table


def changed(scene: Scene, attribute: str, seed: int) -> Scene:
    """The scene with another value of one attribute of its first object (or of the background), drawn from the seed.

    The other object's colour is not used, because prompts tell objects apart by colour.
    """
    first, *others = scene.objects
    taken = {scene.background if attribute == "background" else getattr(first, attribute)}
    if attribute == "color":
        taken |= {other.color for other in others}
    free = [value for value in EDITED[attribute] if value not in taken]
    value = free[int(torch.randint(len(free), (1,), generator=torch.Generator().manual_seed(seed)))]
    if attribute == "background":
        return replace(scene, background=value)
    return replace(scene, objects=(replace(first, **{attribute: value}), *others))


def rewritten(text: str, scene: Scene, target: Scene) -> str:
    """A prompt of a scene with the words changed in which the target differs; unchanged if it does not hold them."""
    old, new = (f"{s.objects[0].size} {s.objects[0].color} {s.objects[0].shape}" for s in (scene, target))
    if old == new:
        old, new = (f"{s.background} background" for s in (scene, target))
    try:
        return replace_words(text, {old: new})
    except ValueError:
        return text


def edit_row(
    pipe: UniViGUPipeline, scenes: list[Scene], attribute: str, strength: float, options: argparse.Namespace
) -> tuple[float, float, float]:
    """Shares of edits that show the change, of other attributes kept, and of first objects whose start is kept."""
    shown, kept, starts = [], [], []
    wanted = iter([changed(scene, attribute, seed) for seed, scene in enumerate(scenes)])
    sampling = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    for part, video, generators in batches(scenes, options.batch_size):
        targets, texts = [next(wanted) for _ in part], list(map(prompt_of, part))
        if options.prompts == "own":
            texts = list(map(brief_of, pipe.caption(video, generator=generators).text))
        prompts = list(map(rewritten, texts, part, targets))
        made = pipe.edit(video, prompts, strength, generator=generators, output_type="pt", **sampling)
        for clip, target in zip(to_uint8(made.frames), targets, strict=True):
            result = score(detect(clip), target)
            shown.append(result[attribute])
            kept += [value for name, value in result.items() if name not in (attribute, "start", "end")]
            starts.append(result["start"])
    return tuple(sum(map(float, values)) / len(values) for values in (shown, kept, starts))  # type: ignore[return-value]


def edit(options: argparse.Namespace, pipe: UniViGUPipeline, scenes: list[Scene]) -> Table:
    """Edits of one attribute at a time."""
    title = (
        f"edits of {options.prompts} prompts, guidance {options.guidance_scale}, {options.num_inference_steps} steps"
    )
    table = Table("changed", "strength", "change shown", "others kept", "start kept", title=title)
    for attribute, strength in track([(name, strength) for strength in options.strength for name in EDITED]):
        shares = edit_row(pipe, scenes, attribute, strength, options)
        table.add_row(attribute, f"{strength:g}", *percents(*shares))
    return table


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (steps, refresh, edit):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(measure=function)
        command.add_argument("--model", type=Path, help="UniViGUPipeline folder; default: the model that ships")
        command.add_argument("--clips", type=int, default=64)
        command.add_argument("--batch-size", type=int, default=32)
        command.add_argument("--device", default=this_device())
    commands.choices["steps"].add_argument("--steps", type=int, nargs="+", default=[4, 6, 8, 10, 16, 50])
    commands.choices["refresh"].add_argument("--refresh", type=int, nargs="+", default=[2, 5, 10, 25, 50])
    commands.choices["refresh"].add_argument("--caption-steps", type=int, default=50)
    commands.choices["edit"].add_argument("--strength", type=float, nargs="+", default=[0.8])
    commands.choices["edit"].add_argument(
        "--prompts", choices=["own", "true"], default="own", help="read by the model?"
    )
    commands.choices["edit"].add_argument("--num-inference-steps", type=int, default=20)
    commands.choices["edit"].add_argument("--guidance-scale", type=float, default=2.0)
    return parser.parse_args(args)


def run(options: argparse.Namespace) -> None:
    if options.clips < 1:
        raise ValueError(f"--clips {options.clips}: expected at least 1")
    pipe = UniViGUPipeline.from_pretrained(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    scenes = [sample_scene(seed, "test") for seed in range(options.clips)]
    Console(width=110).print(options.measure(options, pipe, scenes))


def main(args: list[str] | None = None) -> int:
    options = parse(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
