"""What a trained model's samples are worth on the embedded world, by the checkers.

    python tools/quality.py steps --model my_model   # captions: how few denoising steps are enough
    python tools/quality.py refresh --model my_model # captions: how rarely the video may be computed anew
    python tools/quality.py edit --model my_model    # edits: what changes, what stays

``--model`` is a UniViGUPipeline folder (tools/convert.py pipeline) trained by the shipped configurations; the clips
are those of the test split, which hold combinations that training never shows. Each prints a table.
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
from rich.progress import track
from rich.table import Table

from univigu.cli import exit_code
from univigu.data.video import to_uint8
from univigu.pipeline import UniViGUPipeline
from univigu.sampling.options import SamplingOptions
from univigu.shapes import renderer, scenes, texts
from univigu.shapes.metrics import ShapesTextAccuracy, score
from univigu.shapes.scenes import Scene
from univigu.shapes.video_checker import detect

WAYS: dict[str, dict[str, Any]] = {
    "random order": {},
    "surest first": {"text_order": "confidence"},
    "surest first, all over 0.9": {"text_order": "confidence", "confidence_threshold": 0.9},
}
EDITED = ("color", "shape", "size", "background")


def clips(scenes: list[Scene], size: int) -> Iterator[tuple[list[Scene], torch.Tensor]]:
    """Batches of scenes and their frames in [0, 1], [B, F, C, H, W]."""
    for start in range(0, len(scenes), size):
        part = scenes[start : start + size]
        yield part, torch.stack([renderer.render(scene) for scene in part]).float() / 255


def seeds(start: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(start + i) for i in range(count)]


# ---------------------------------------------------------------------- steps


def caption_accuracy(
    pipe: UniViGUPipeline, scenes: list[Scene], kind: str, options: SamplingOptions, batch_size: int
) -> tuple[dict[str, float], float]:
    """Accuracy by property of the scenes' captions, and how many steps a batch took."""
    accuracy, taken = ShapesTextAccuracy(kind), []
    for number, (part, video) in enumerate(clips(scenes, batch_size)):
        last = [0]

        def count(pipe: Any, step: int, timestep: float, tensors: dict[str, Any], last: list[int] = last) -> None:
            last[0] = step + 1

        generator = seeds(number * batch_size, len(part))
        made = pipe.caption(video, generator=generator, options=options, callback_on_step_end=count)
        accuracy.update(made.text or [], part)
        taken.append(last[0])
    return {name: value.item() for name, value in accuracy.compute().items()}, sum(taken) / len(taken)


def kind_of(pipe: UniViGUPipeline) -> str:
    """Which text the model was last trained to write, by the slot it has for it."""
    return "prompt" if pipe.transformer.config.text_length < 128 else "caption"


def steps(options: argparse.Namespace, pipe: UniViGUPipeline, scenes: list[Scene]) -> Table:
    kind = kind_of(pipe)
    table = Table("order", "steps allowed", "taken", "mean", "exact", "seconds a clip", title=f"captions ({kind})")
    rows = [(way, count) for way in WAYS for count in options.steps]
    for way, count in track(rows, description="captions", console=Console(stderr=True)):
        start = time.perf_counter()
        sampling = SamplingOptions(caption_steps=count, **WAYS[way])
        accuracy, taken = caption_accuracy(pipe, scenes, kind, sampling, options.batch_size)
        seconds = (time.perf_counter() - start) / len(scenes)
        shown = (f"{100 * accuracy[name]:.1f}" for name in ("mean", "exact"))
        table.add_row(way, str(count), f"{taken:.1f}", *shown, f"{seconds:.3f}")
    return table


# -------------------------------------------------------------------- refresh


def refresh(options: argparse.Namespace, pipe: UniViGUPipeline, scenes: list[Scene]) -> Table:
    """Captions whose video is computed anew at every k-th step, beside those of k = 1 from the same random numbers."""
    reads_text = pipe.transformer.config.clean_video_reads_text
    kept = "reads text" if reads_text else "does not read text: kept once, exactly, whatever k"
    title = f"captions, {options.caption_steps} steps; clean video {kept}"
    table = Table("k", "tokens as with k = 1", "captions as with k = 1", "mean", "exact", "seconds a clip", title=title)
    kind, pad, exact = kind_of(pipe), pipe.tokenizer.pad_token_id, None
    for k in track([1, *options.refresh], description="captions", console=Console(stderr=True)):
        start = time.perf_counter()
        sampling = SamplingOptions(caption_steps=options.caption_steps, caption_refresh=k)
        tokens, accuracy = [], ShapesTextAccuracy(kind)
        for number, (part, video) in enumerate(clips(scenes, options.batch_size)):
            made = pipe.caption(video, generator=seeds(number * options.batch_size, len(part)), options=sampling)
            accuracy.update(made.text or [], part)
            tokens.append(made.tokens.cpu())  # type: ignore[union-attr]
        seconds, ids = (time.perf_counter() - start) / len(scenes), torch.cat(tokens)
        exact = ids if exact is None else exact
        same, counted = ids == exact, (ids != pad) | (exact != pad)  # padding agrees by itself
        shares = (same[counted].float().mean(), same.all(dim=1).float().mean())
        values = {name: value.item() for name, value in accuracy.compute().items()}
        shown = (100 * float(share) for share in (*shares, values["mean"], values["exact"]))
        first, *rest = shown
        table.add_row(str(k), f"{first:.2f}", *(f"{value:.1f}" for value in rest), f"{seconds:.3f}")
    return table


# ----------------------------------------------------------------------- edit


def changed(scene: Scene, attribute: str, seed: int) -> Scene:
    """The scene with one attribute of its first object (or the background) another one, drawn from the seed.

    A colour that the other object has is not taken: prompts tell objects apart by it.
    """
    tables = {
        "color": scenes.COLORS, "shape": scenes.SHAPES, "size": scenes.SIZES, "background": scenes.BACKGROUNDS
    }  # fmt: skip
    taken = {scene.background} if attribute == "background" else {getattr(o, attribute) for o in scene.objects[:1]}
    if attribute == "color":
        taken |= {other.color for other in scene.objects}
    free = [value for value in tables[attribute] if value not in taken]
    value = free[torch.randint(len(free), (1,), generator=torch.Generator().manual_seed(seed)).item()]  # type: ignore[call-overload]
    if attribute == "background":
        return replace(scene, background=value)
    return replace(scene, objects=(replace(scene.objects[0], **{attribute: value}), *scene.objects[1:]))


def edit_row(
    pipe: UniViGUPipeline, scenes: list[Scene], attribute: str, strength: float, options: argparse.Namespace
) -> tuple[float, float, float]:
    """Shares of edits whose changed property shows, of other properties kept, and of first objects still in place."""
    hits, kept, places = [], [], []
    wanted = [changed(scene, attribute, seed) for seed, scene in enumerate(scenes)]
    for number, (part, video) in enumerate(clips(scenes, options.batch_size)):
        start = number * options.batch_size
        targets = wanted[start : start + len(part)]
        made = pipe.edit(
            video, [texts.prompt_of(target) for target in targets], strength, seeds(start, len(part)),
            num_inference_steps=options.num_inference_steps, guidance_scale=options.guidance_scale, output_type="pt",
        )  # fmt: skip
        for clip, target in zip(to_uint8(made.frames), targets, strict=True):
            result = score(detect(clip), target)
            hits.append(result[attribute])
            kept += [value for name, value in result.items() if name not in (attribute, "start", "end", "exact")]
            places.append(result["start"])
    return tuple(sum(map(float, values)) / len(values) for values in (hits, kept, places))  # type: ignore[return-value]


def edit(options: argparse.Namespace, pipe: UniViGUPipeline, scenes: list[Scene]) -> Table:
    title = f"edits of one property, guidance {options.guidance_scale}, {options.num_inference_steps} steps"
    table = Table("changed", "strength", "change shown", "others kept", "start place kept", title=title)
    rows = [(attribute, strength) for strength in options.strength for attribute in EDITED]
    for attribute, strength in track(rows, description="edits", console=Console(stderr=True)):
        shares = edit_row(pipe, scenes, attribute, strength, options)
        table.add_row(attribute, f"{strength:g}", *(f"{100 * share:.1f}" for share in shares))
    return table


# -------------------------------------------------------------------- command


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    curve = commands.add_parser("steps", help="caption accuracy by denoising steps")
    curve.add_argument("--steps", type=int, nargs="+", default=[4, 6, 8, 10, 16, 50])
    stale = commands.add_parser("refresh", help="captions by how often the clean video is computed anew")
    stale.add_argument("--refresh", type=int, nargs="+", default=[2, 5, 10, 25, 50])
    stale.add_argument("--caption-steps", type=int, default=50)
    edits = commands.add_parser("edit", help="edits of one property")
    edits.add_argument("--strength", type=float, nargs="+", default=[0.8, 0.9])
    edits.add_argument("--num-inference-steps", type=int, default=20)
    edits.add_argument("--guidance-scale", type=float, default=2.0)
    for command in (curve, stale, edits):
        command.add_argument("--model", type=Path, required=True, help="UniViGUPipeline folder")
        command.add_argument("--clips", type=int, default=64)
        command.add_argument("--batch-size", type=int, default=32)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(args)
    for name in ("clips", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")
    return options


def run(options: argparse.Namespace) -> None:
    pipe = UniViGUPipeline.from_pretrained(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    scenes = [scenes.sample_scene(seed, "test") for seed in range(options.clips)]
    table = {"steps": steps, "refresh": refresh, "edit": edit}[options.command](options, pipe, scenes)
    Console(width=110).print(table)


def main(args: list[str] | None = None) -> int:
    options = parse(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
