"""A web page with every task of the pipeline and the sampling steps of each result."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from univigu.data.video import encode_mp4, read_video, to_uint8
from univigu.pipeline import UniViGUOutput, UniViGUPipeline, check_prompts
from univigu.shapes.scenes import CANVAS, FPS, NUM_FRAMES
from univigu.viewer import TrajectoryRecorder

EXAMPLE = "a large red circle moving left slowly, on a black background"
EDITED = "a large red square moving left slowly, on a black background"


@dataclass
class DemoOptions:
    """Format of the page's videos."""

    height: int = CANVAS
    """Of the videos, in pixels."""
    width: int = CANVAS
    """Of the videos, in pixels."""
    num_frames: int = NUM_FRAMES
    """Frames a video, 4k+1 for Wan's VAE."""
    fps: int = FPS
    """Frames a second of the videos written."""
    max_sequence_length: int = 128
    """Slot of the prompt in tokens."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")


class DemoError(ValueError):
    """A visitor's mistake; shown on the page."""


class Demo:
    """The page's functions; each returns what it made and the page of its trajectory.

    Args:
        pipe: the model.
        options: see ``DemoOptions``.
        folder: where videos are written; None is a temporary one.
    """

    def __init__(
        self, pipe: UniViGUPipeline, options: DemoOptions | None = None, folder: str | Path | None = None
    ) -> None:
        self.pipe, self.options = pipe, options or DemoOptions()
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="univigu-demo-")  # removed with this object
        self.folder = Path(self._temporary.name if folder is None else folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pipe.set_progress_bar_config(disable=True)
        self.count = 0

    def generate(self, prompt: str, steps: int, guidance: float, seed: int) -> tuple[str, str]:
        """Video from a prompt: path of an mp4 file, and the trajectory."""
        prompt, options = _required(prompt, "prompt"), self._options(seed, steps, guidance)
        # The pipeline's own call, WanPipeline's, would cut it; the other tasks check for themselves.
        check_prompts(self.pipe.tokenizer, [prompt], self.options.max_sequence_length)
        return self._write(self.pipe(prompt, **self._size(), **options).frames), _framed(options)

    def caption(self, video: str | None, question: str, steps: int, seed: int) -> tuple[str, str]:
        """Text from a video file, given a question or nothing: the text, and the trajectory."""
        options = self._options(seed)
        made = self.pipe.caption(self._read(video), question.strip(), caption_steps=int(steps), **options)
        return _text(made), _framed(options)

    def joint(self, prompt: str, steps: int, guidance: float, seed: int) -> tuple[str, str, str]:
        """Video and its text together: path of an mp4 file, the text, and the trajectory."""
        options = self._options(seed, steps, guidance)
        made = self.pipe.joint(_required(prompt, "prompt"), **self._size(), **options)
        return self._write(made.frames), _text(made), _framed(options)

    def edit(
        self, video: str | None, new_prompt: str, strength: float, steps: int, guidance: float, seed: int
    ) -> tuple[str, str]:
        """A video file regenerated under another prompt: path of an mp4 file, and the trajectory."""
        options = self._options(seed, steps, guidance)
        made = self.pipe.edit(self._read(video), _required(new_prompt, "prompt"), strength, **options)
        return self._write(made.frames), _framed(options)

    def _size(self) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in ("height", "width", "num_frames")}

    def _options(self, seed: int, steps: int | None = None, guidance: float = 1.0) -> dict[str, Any]:
        """Options of the pipeline's tasks; the number of steps and the guidance if a video is made."""
        video = {"num_inference_steps": int(steps), "guidance_scale": guidance, "output_type": "pt"} if steps else {}
        return video | {
            "generator": torch.Generator().manual_seed(int(seed)),
            "max_sequence_length": self.options.max_sequence_length,
            "callback_on_step_end": TrajectoryRecorder(self.pipe),
        }

    def _read(self, video: str | None) -> torch.Tensor:
        """[1, F, C, H, W] in [0, 1]."""
        if not video:
            raise DemoError("video: none was given")
        return read_video(video, self.options.num_frames, self.options.height, self.options.width)[None].float() / 255

    def _write(self, frames: torch.Tensor) -> str:
        self.count += 1
        path = self.folder / f"{self.count:06d}.mp4"
        path.write_bytes(encode_mp4(to_uint8(frames[0]).cpu(), self.options.fps))
        return str(path)


def _text(made: UniViGUOutput) -> str:
    assert made.text is not None
    return made.text[0]


def _required(text: str, name: str) -> str:
    if not text.strip():
        raise DemoError(f"{name}: is empty")
    return text.strip()


def _framed(options: dict[str, Any]) -> str:
    """The recorded trajectory in a frame of its own, so that its style and script stay inside."""
    source = html.escape(options["callback_on_step_end"].page(), quote=True)
    return f'<iframe srcdoc="{source}" style="width: 100%; height: 640px; border: 0"></iframe>'


def build(demo: Demo) -> Any:
    """The gradio page; its functions are also at its HTTP API as /generate, /caption, /joint and /edit."""
    import gradio

    inputs: dict[str, Callable[[], Any]] = {  # by the parameters of the functions
        "prompt": lambda: gradio.Textbox(EXAMPLE, label="prompt"),
        "new_prompt": lambda: gradio.Textbox(EDITED, label="prompt of the new video"),
        "video": lambda: gradio.Video(label="video"),
        "question": lambda: gradio.Textbox("", label="question (empty: describe the video)"),
        "strength": lambda: gradio.Slider(0.05, 1.0, 0.8, step=0.05, label="strength (1 keeps nothing)"),
        "steps": lambda: gradio.Slider(1, 100, 20, step=1, label="steps"),
        "guidance": lambda: gradio.Slider(1.0, 8.0, 2.0, step=0.5, label="guidance scale"),
        "seed": lambda: gradio.Number(0, label="seed", precision=0),
    }
    outputs: dict[str, Callable[[], Any]] = {
        "video": lambda: gradio.Video(label="video", autoplay=True, loop=True),
        "text": lambda: gradio.Textbox(label="text", lines=6),
        "trajectory": lambda: gradio.HTML(label="steps of the sampling"),
    }

    def with_messages(function: Any) -> Any:
        def call(*values: Any) -> Any:
            try:
                return function(*values)
            except ValueError as error:
                raise gradio.Error(str(error)) from error

        return call

    with gradio.Blocks(title="Uni-ViGU", delete_cache=(3600, 3600)) as page:
        gradio.Markdown("# Uni-ViGU\nOne diffusion model that makes video and understands it.")
        for name, made in {"generate": "video", "caption": "text", "joint": "video text", "edit": "video"}.items():
            function = getattr(demo, name)
            with gradio.Tab(name.capitalize()):
                given = [inputs[parameter]() for parameter in signature(function).parameters]
                shown = [outputs[output]() for output in made.split()]
                button = gradio.Button("Run", variant="primary")
                shown.append(outputs["trajectory"]())
                button.click(with_messages(function), given, shown, api_name=name)
    return page
