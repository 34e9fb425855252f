"""``univigu demo``: a web page with every task of a model and the sampling steps of each result.

pip install -e ".[demo]"
univigu demo                       # the model that ships
univigu demo --model my_model      # a folder made by tools/convert.py pipeline

The page is served to this machine only. Options after "demo" are those of its videos and of the model.
"""

from __future__ import annotations

import argparse
import html
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from univigu.cli import ToolParser
from univigu.data.engine import this_device
from univigu.data.options import add_options, check_dtype, check_least, read_options
from univigu.data.video import encode_mp4, probe_video, read_video, to_uint8
from univigu.models.tokens import tokenize
from univigu.pipeline import TaskRunner, UniViGUPipeline
from univigu.shapes.renderer import render
from univigu.shapes.scenes import CANVAS, FPS, NUM_FRAMES, sample_scene
from univigu.shapes.text_checker import brief_of
from univigu.shapes.texts import prompt_of, questions_of
from univigu.viewer import TrajectoryRecorder

HOST = "127.0.0.1"
MAX_FILE_SIZE = "50mb"
MAX_FRAMES = 3600
"""Frames of a clip that is uploaded, one minute at 60 a second."""
MAX_CHARACTERS = 2000
"""Length of a text; its tokens are limited by ``max_sequence_length``, too."""
EXAMPLES = [sample_scene(seed, "test") for seed in range(4)]


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
        check_least(self, height=1, width=1, num_frames=1, fps=1, max_sequence_length=1)


class Demo:
    """The page's functions; each returns what it made, a file of a video before a text, and the page of its steps."""

    def __init__(self, pipe: UniViGUPipeline, options: DemoOptions) -> None:
        self.pipe, self.options = pipe, options
        self.folder = tempfile.TemporaryDirectory(prefix="univigu-demo-")  # of videos; removed with this object
        self.pipe.set_progress_bar_config(disable=True)  # on the console; the page has it
        self.size = {"height": options.height, "width": options.width, "num_frames": options.num_frames}

    def caption(self, video: str | None, steps: int, seed: int) -> tuple[str, ...]:
        """Text from a video file."""
        return self._run(self.pipe.caption, seed, self._frames(video), caption_steps=int(steps))

    def ask(self, video: str | None, question: str, steps: int, seed: int) -> tuple[str, ...]:
        """Answer to a question about a video file."""
        given = self._frames(video), _required(question, "question")
        return self._run(self.pipe.answer, seed, *given, caption_steps=int(steps))

    def generate(self, prompt: str, steps: int, guidance: float, seed: int) -> tuple[str, ...]:
        """Video from a prompt."""
        prompt, options = _required(prompt, "prompt"), self.size | _video_options(steps, guidance)
        # The pipeline's own call, WanPipeline's, would cut it; the other tasks check for themselves.
        limit = self.options.max_sequence_length
        tokenize(self.pipe.tokenizer, [prompt], limit, f"max_sequence_length={limit}: prompt")
        return self._run(self.pipe, seed, prompt, **options)

    def joint(self, prompt: str, steps: int, guidance: float, seed: int) -> tuple[str, ...]:
        """Video and its text together."""
        options = self.size | _video_options(steps, guidance)
        return self._run(self.pipe.joint, seed, _required(prompt, "prompt"), **options)

    def describe(self, video: str | None, seed: int) -> str:
        """The model's own prompt of a video file, to be changed for ``edit``."""
        return brief_of(self.caption(video, 16, seed)[0])

    def edit(
        self, video: str | None, new_prompt: str, strength: float, steps: int, guidance: float, seed: int
    ) -> tuple[str, ...]:
        """A video file regenerated under another prompt."""
        given = self._frames(video), _required(new_prompt, "prompt"), strength
        return self._run(self.pipe.edit, seed, *given, **_video_options(steps, guidance))

    def examples(self) -> list[str]:
        """Example clips as mp4 files."""
        return [self._save(render(scene, **self.size)) for scene in EXAMPLES]

    def _run(self, task: Callable[..., Any], seed: int, *given: Any, **options: Any) -> tuple[str, ...]:
        recorder = TrajectoryRecorder(self.pipe)
        options |= {"generator": torch.Generator().manual_seed(int(seed)), "callback_on_step_end": recorder}
        made = task(*given, max_sequence_length=self.options.max_sequence_length, **options)
        results = [] if made.frames is None else [self._save(to_uint8(made.frames[0]).cpu())]
        results += getattr(made, "text", None) or []
        # In a frame of its own, so that its style and script stay inside.
        source = html.escape(recorder.page(), quote=True)
        frame = f'<iframe srcdoc="{source}" title="steps" style="width: 100%; height: 640px; border: 0"></iframe>'
        return (*results, frame)

    def _frames(self, video: str | None) -> torch.Tensor:
        """[1, F, C, H, W] in [0, 1]."""
        if not video:
            raise ValueError("video: none was given")
        if (number := probe_video(video)[2]) > MAX_FRAMES:
            raise ValueError(f"video: it has {number} frames, over the limit of {MAX_FRAMES}")
        return read_video(video, self.options.num_frames, self.options.height, self.options.width)[None].float() / 255

    def _save(self, frames: torch.Tensor) -> str:
        with tempfile.NamedTemporaryFile(suffix=".mp4", dir=self.folder.name, delete=False) as file:
            file.write(encode_mp4(frames, self.options.fps))
        return file.name


def _video_options(steps: int, guidance: float) -> dict[str, Any]:
    return {"num_inference_steps": int(steps), "guidance_scale": guidance, "output_type": "pt"}


def _required(text: str, name: str) -> str:
    if not text.strip():
        raise ValueError(f"{name}: is empty")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name}: it has {len(text)} characters, over the limit of {MAX_CHARACTERS}")
    return text.strip()


def build(demo: Demo) -> Any:
    """The gradio page; its functions are also at its HTTP API by their names, such as /generate."""
    import gradio

    prompts = [prompt_of(scene) for scene in EXAMPLES]
    texts: dict[str, Any] = {"max_length": MAX_CHARACTERS, "lines": 2}
    parts: dict[str, Callable[[], Any]] = {
        "prompt": lambda: gradio.Textbox(prompts[0], label="Prompt", **texts),
        "new_prompt": lambda: gradio.Textbox(label="Prompt of the new video", **texts),
        "video": lambda: gradio.Video(label="Video", height=260, sources=["upload"]),
        "read": lambda: gradio.Button("Read the video"),
        "question": lambda: gradio.Textbox("what color is the background?", label="Question", **texts),
        "strength": lambda: gradio.Slider(0.05, 1.0, 0.8, step=0.05, label="Strength (1 keeps nothing of the video)"),
        "steps": lambda: gradio.Slider(1, 100, 20, step=1, label="Steps"),
        "guidance": lambda: gradio.Slider(1.0, 8.0, 2.0, step=0.5, label="Guidance scale"),
        "seed": lambda: gradio.Number(0, label="Seed", precision=0),
        "result": lambda: gradio.Video(label="Result", height=260, autoplay=True, loop=True),
        "text": lambda: gradio.Textbox(label="Text", lines=4),
    }
    one_at_a_time = {"concurrency_id": "model"}  # of all tasks; without it of each
    questions = [questions_of(scene)[-1]["question"] for scene in EXAMPLES]
    examples = {"video": demo.examples(), "prompt": prompts, "question": questions}

    def tracked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(progress: Any = gradio.Progress(track_tqdm=True), *values: Any) -> Any:  # noqa: B008  (gradio's way)
            return function(*values)

        return call

    def add_tab(name: str, needed: str, folded: str, made: str, about: str) -> None:
        """The tab of a function, from the parts for its parameters, in their order, and for what it makes."""
        with gradio.Tab(name.capitalize()):
            gradio.Markdown(about)
            with gradio.Row():
                with gradio.Column():
                    given = {key: parts[key]() for key in needed.split()}
                    with gradio.Accordion("Options", open=False):
                        given |= {key: parts[key]() for key in folded.split()}
                    button = gradio.Button("Run", variant="primary")
                with gradio.Column():
                    results = [parts[key]() for key in made.split()]
            results.append(gradio.HTML(label="Steps of the sampling"))
            filled = [key for key in examples if key in given]
            rows = [list(row) for row in zip(*(examples[key] for key in filled), strict=True)]
            gradio.Examples(rows, [given[key] for key in filled])
            if "read" in given:
                where = [given["video"], given["seed"]]
                read = given.pop("read")
                read.click(tracked(demo.describe), where, given["new_prompt"], api_name="describe", **one_at_a_time)
            function = tracked(getattr(demo, name))
            shown = {"api_name": name, "show_progress_on": results[0]} | one_at_a_time
            button.click(function, list(given.values()), results, **shown)

    with gradio.Blocks(title="Uni-ViGU", delete_cache=(3600, 3600), analytics_enabled=False) as page:
        gradio.Markdown("# Uni-ViGU\nOne diffusion model that makes video and understands it.")
        asked = "Ask a question about a video. The model must be trained on questions."
        edited = "Let the model read the video, change words of its text, and regenerate the video."
        together = "Make a video and its detailed caption together."
        add_tab("caption", "video", "steps seed", "text", "Describe a video.")
        add_tab("ask", "video question", "steps seed", "text", asked)
        add_tab("generate", "prompt", "steps guidance seed", "result", "Make a video from a prompt.")
        add_tab("joint", "prompt", "steps guidance seed", "result text", together)
        add_tab("edit", "video read new_prompt strength", "steps guidance seed", "result", edited)
    return page.queue(max_size=16, default_concurrency_limit=1)


def launch(page: Any, port: int | None = None, **options: Any) -> Any:
    """Serve the page to this machine only; errors are shown on it."""
    import gradio

    theme: Any = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no downloads
    given = {"server_name": HOST, "server_port": port, "max_file_size": MAX_FILE_SIZE, "theme": theme}
    return page.launch(show_error=True, **given, **options)


def parse(args: list[str]) -> argparse.Namespace:
    parser = ToolParser(prog="univigu demo", description=__doc__)
    parser.add_argument("--model", help="folder of a pipeline; default: the model that ships")
    parser.add_argument("--device", default=this_device())
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--port", type=int, default=7860)
    add_options(parser, DemoOptions())
    return parser.parse_args(args)


def main(args: list[str]) -> None:
    """Run ``univigu demo`` with the arguments after "demo"."""
    given = parse(args)
    if find_spec("gradio") is None:
        raise ValueError('univigu demo needs gradio: pip install "univigu[demo]"')
    options = read_options(DemoOptions, given)
    pipe = UniViGUPipeline.from_pretrained(given.model, torch_dtype=check_dtype(given.dtype, "--dtype"))
    demo = Demo(pipe.to(given.device), options)
    # A wrong size is named before the page opens.
    TaskRunner(pipe, pipe.transformer, lambda: pipe.scheduler).latents_shape(**demo.size)
    page = build(demo)
    try:
        launch(page, given.port)
    finally:
        page.close()  # removes gradio's copies of videos
