"""Draw videos and their captions at every step of joint sampling (docs/pictures/joint.gif).

    python tools/picture.py --model my_model --output joint.gif
    python tools/picture.py --model my_model --output joint.webp --prompt "a small blue ring staying still, ..."

``--model`` is a UniViGUPipeline folder (tools/convert.py pipeline).
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageSequence

from univigu.cli import ToolParser, exit_code
from univigu.pipeline import UniViGUPipeline
from univigu.viewer import TrajectoryRecorder

PROMPTS = [
    "a large red circle moving left slowly, on a black background",
    "a large blue ring moving up quickly, left of a large yellow triangle staying still, on a gray background",
    "a large green cross moving right slowly, above a large purple square staying still, on a white background",
]
SIDE, LINES, MARGIN, FONT = 224, 19, 10, 12  # pixels of a video, lines of text below it, pixels between, points


def record(pipe: UniViGUPipeline, prompt: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """The steps of a joint sample, see ``TrajectoryRecorder``."""
    recorder = TrajectoryRecorder(pipe, every=2, scale=1)
    given: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "callback_on_step_end": recorder}
    pipe.joint(prompt, height=64, width=64, num_frames=9, num_inference_steps=steps, **given)
    return recorder.steps


def video_of(step: dict[str, Any]) -> list[Image.Image]:
    """A recorded step's frames, enlarged."""
    data = base64.b64decode(step["video"].partition(",")[2])
    frames = ImageSequence.Iterator(Image.open(io.BytesIO(data)))
    return [frame.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for frame in frames]


def panel(frame: Image.Image, step: dict[str, Any], font: Any) -> Image.Image:
    """One video's frame with its text below; masked tokens are dots."""
    image = Image.new("RGB", (SIDE + 2 * MARGIN, SIDE + 3 * MARGIN + LINES * (FONT + 2)), "white")
    image.paste(frame, (MARGIN, MARGIN))
    marks = {"": " ·", "\u200b": "", "■": "", "</s>": ""}  # masked, padding, the end, an early end
    text = "".join(marks.get(word.strip(" "), word) for word in step["words"])
    lines = textwrap.wrap(text, int(SIDE / (0.48 * FONT)))[:LINES]
    ImageDraw.Draw(image).multiline_text((MARGIN, SIDE + 2 * MARGIN), "\n".join(lines), "black", font, spacing=2)
    return image


def draw(samples: list[list[dict[str, Any]]]) -> list[Image.Image]:
    """All frames: the samples side by side, each step continuing the clip at the frame where the last one stopped."""
    font, pictures, clock, count = ImageFont.load_default(FONT), [], 0, max(map(len, samples))
    samples = [steps + steps[-1:] * (count - len(steps)) for steps in samples]  # some texts end before others
    for number, steps in enumerate(zip(*samples, strict=True), 1):
        videos = [video_of(step) for step in steps]
        for _ in range(2 * len(videos[0]) if number == count else 2):
            panels = [panel(video[clock % len(video)], step, font) for video, step in zip(videos, steps, strict=True)]
            pictures.append(Image.fromarray(np.hstack([np.asarray(picture) for picture in panels])))
            clock += 1
    return pictures


def run(options: argparse.Namespace) -> None:
    pipe = UniViGUPipeline.from_pretrained(options.model)
    pictures = draw([record(pipe, prompt, seed, options.steps) for seed, prompt in enumerate(options.prompt)])
    if options.output.suffix.lower() == ".gif":
        pictures = [picture.quantize(48) for picture in pictures]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {"optimize": True, "quality": 30}  # GIF's, WebP's
    pictures[0].save(options.output, save_all=True, append_images=pictures[1:], duration=140, loop=0, **kept)
    print(f"wrote {options.output}: {len(pictures)} pictures, {options.output.stat().st_size / 2**20:.1f} MiB")


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="UniViGUPipeline folder")
    parser.add_argument("--output", type=Path, required=True, help="the picture, a .gif or (smaller) .webp file")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="one a video")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of the videos")
    options = parser.parse_args(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
