"""A page to try a model on: every task of the pipeline, and how each sample came into being."""

from __future__ import annotations

import html
import tempfile
from dataclasses import dataclass
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
    """What the page's videos are like."""

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


class Demo:
    """The page's functions; each returns what it made and the page of its trajectory.

    Args:
        pipe: the model.
        options: see :class:`DemoOptions`.
        folder: where videos are written; None makes a temporary one.
    """

    def __init__(
        self, pipe: UniViGUPipeline, options: DemoOptions | None = None, folder: str | Path | None = None
    ) -> None:
        self.pipe, self.options = pipe, options or DemoOptions()
        self.folder = Path(folder or tempfile.mkdtemp(prefix="univigu-demo-"))
        self.pipe.set_progress_bar_config(disable=True)
        self.count = 0

    def generate(self, prompt: str, steps: int, guidance: float, seed: int) -> tuple[str, str]:
        """Video from a prompt: path of an mp4 file, and the trajectory."""
        recorder, prompt = TrajectoryRecorder(self.pipe), _filled(prompt, "prompt")
        # The pipeline's own call, WanPipeline's, would cut it; the other tasks check for themselves.
        check_prompts(self.pipe.tokenizer, [prompt], self.options.max_sequence_length)
        frames = self.pipe(
            prompt, **self._size(), guidance_scale=guidance, **self._common(steps, seed, recorder)
        ).frames
        return self._write(frames), _framed(recorder)

    def caption(self, video: str | None, question: str, steps: int, seed: int) -> tuple[str, str]:
        """Text from a video file, given a question or nothing: the text, and the trajectory."""
        recorder = TrajectoryRecorder(self.pipe)
        made = self.pipe.caption(
            self._read(video),
            question.strip(),
            torch.Generator().manual_seed(int(seed)),
            caption_steps=int(steps),
            max_sequence_length=self.options.max_sequence_length,
            callback_on_step_end=recorder,
        )
        return _first(made), _framed(recorder)

    def joint(self, prompt: str, steps: int, guidance: float, seed: int) -> tuple[str, str, str]:
        """Video and its text together: path of an mp4 file, the text, and the trajectory."""
        recorder = TrajectoryRecorder(self.pipe)
        made = self.pipe.joint(
            _filled(prompt, "prompt"), **self._size(), guidance_scale=guidance, **self._common(steps, seed, recorder)
        )
        return self._write(made.frames), _first(made), _framed(recorder)

    def edit(
        self, video: str | None, prompt: str, strength: float, steps: int, guidance: float, seed: int
    ) -> tuple[str, str]:
        """A video file made anew under another prompt: path of an mp4 file, and the trajectory."""
        recorder = TrajectoryRecorder(self.pipe)
        made = self.pipe.edit(
            self._read(video),
            _filled(prompt, "prompt"),
            strength,
            guidance_scale=guidance,
            **self._common(steps, seed, recorder),
        )
        return self._write(made.frames), _framed(recorder)

    def _size(self) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in ("height", "width", "num_frames")}

    def _common(self, steps: int, seed: int, recorder: TrajectoryRecorder) -> dict[str, Any]:
        return {
            "num_inference_steps": int(steps),
            "generator": torch.Generator().manual_seed(int(seed)),
            "max_sequence_length": self.options.max_sequence_length,
            "callback_on_step_end": recorder,
            "output_type": "pt",
        }

    def _read(self, video: str | None) -> torch.Tensor:
        """[1, F, C, H, W] in [0, 1]."""
        if not video:
            raise DemoError("video: none was given")
        size = self.options
        return read_video(video, size.num_frames, size.height, size.width)[None].float() / 255

    def _write(self, frames: torch.Tensor) -> str:
        self.count += 1
        path = self.folder / f"{self.count:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_mp4(to_uint8(frames[0]).cpu(), self.options.fps))
        return str(path)


class DemoError(ValueError):
    """What a visitor can mend; shown on the page."""


def _first(made: UniViGUOutput) -> str:
    assert made.text is not None
    return made.text[0]


def _filled(text: str, name: str) -> str:
    if not text.strip():
        raise DemoError(f"{name}: is empty")
    return text.strip()


def _framed(recorder: TrajectoryRecorder) -> str:
    """The trajectory in a frame of its own, so that its style and script stay inside."""
    source = html.escape(recorder.page(), quote=True)
    return f'<iframe srcdoc="{source}" style="width: 100%; height: 640px; border: 0"></iframe>'


def build(demo: Demo) -> Any:
    """The gradio page; its functions are also at its HTTP API as /generate, /caption, /joint and /edit."""
    import gradio

    def shown(function: Any) -> Any:
        def call(*values: Any) -> Any:
            try:
                return function(*values)
            except ValueError as error:
                raise gradio.Error(str(error)) from error

        return call

    def sampling(guided: bool = True) -> list[Any]:
        steps = gradio.Slider(1, 100, 20, step=1, label="steps")
        scale = gradio.Slider(1.0, 8.0, 2.0, step=0.5, label="guidance scale")
        seed = gradio.Number(0, label="seed", precision=0)
        if not guided:
            scale.visible = False
        return [steps, scale, seed] if guided else [steps, seed]

    def tab(title: str, inputs: list[Any], function: Any, outputs: list[Any]) -> None:
        trajectory = gradio.HTML(label="how it came into being")
        gradio.Button(title, variant="primary").click(
            shown(function), inputs, [*outputs, trajectory], api_name=function.__name__
        )

    with gradio.Blocks(title="Uni-ViGU") as page:
        gradio.Markdown("# Uni-ViGU\nOne diffusion model that makes video and understands it.")
        with gradio.Tab("Generate"):
            inputs = [gradio.Textbox(EXAMPLE, label="prompt"), *sampling()]
            tab("Generate", inputs, demo.generate, [gradio.Video(label="video", autoplay=True, loop=True)])
        with gradio.Tab("Caption"):
            question = gradio.Textbox("", label="question (empty: describe the video)")
            inputs = [gradio.Video(label="video"), question, *sampling(guided=False)]
            tab("Caption", inputs, demo.caption, [gradio.Textbox(label="text", lines=6)])
        with gradio.Tab("Joint"):
            inputs = [gradio.Textbox(EXAMPLE, label="prompt"), *sampling()]
            outputs = [gradio.Video(label="video", autoplay=True, loop=True), gradio.Textbox(label="text", lines=6)]
            tab("Make both", inputs, demo.joint, outputs)
        with gradio.Tab("Edit"):
            strength = gradio.Slider(0.05, 1.0, 0.8, step=0.05, label="strength (1 keeps nothing)")
            inputs = [gradio.Video(label="video"), gradio.Textbox(EDITED, label="what it shall show"), strength]
            inputs += sampling()
            tab("Edit", inputs, demo.edit, [gradio.Video(label="video", autoplay=True, loop=True)])
    return page
