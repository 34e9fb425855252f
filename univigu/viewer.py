"""A sample coming into being, as one HTML file: a slider over the steps, the video playing, the text as it forms.

recorder = TrajectoryRecorder(pipe)
pipe.joint("a red circle moving left", ..., callback_on_step_end=recorder)
recorder.save("trajectory.html")
"""

from __future__ import annotations

import base64
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from univigu.data.video import to_frames
from univigu.models.conventions import Conventions
from univigu.sampling.sampler import StepState

TEMPLATE = "assets/trajectory.html"


class TrajectoryRecorder:
    """Keeps the intermediate states of one sample; give it to a task as ``callback_on_step_end``.

    Args:
        pipe: the pipeline whose VAE and tokenizer read the states.
        sample: which of the batch.
        every: keep every so many steps; the last one is always kept.
        scale: enlargement of the video.
        fps: frames a second of the playing video.
    """

    def __init__(self, pipe: Any, sample: int = 0, every: int = 1, scale: int = 4, fps: int = 8) -> None:
        for name, value, least in (("sample", sample, 0), ("every", every, 1), ("scale", scale, 1), ("fps", fps, 1)):
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")
        self.pipe, self.sample, self.every, self.scale, self.fps = pipe, sample, every, scale, fps
        self.steps: list[dict[str, Any]] = []
        self._clean: str | None = None  # a caption's video is the same at every step

    def __call__(self, pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's callback, of the tasks and of WanPipeline's own call."""
        state = tensors.get("state")
        if state is None:
            video_time = 1.0 - float(pipe.scheduler.sigmas[step + 1])
            last = step + 1 == pipe.num_timesteps
            state = StepState(step, pipe.num_timesteps, tensors["latents"], video_time, None, None, last)
        self.record(state)
        return {}  # nothing to be replaced

    def record(self, state: StepState) -> None:
        """Keep a step, if it is one to keep.

        Raises:
            IndexError: the batch has no such sample.
        """
        if state.step % self.every and not state.last:
            return
        if self.sample >= len(state.latents):
            raise IndexError(f"sample={self.sample}: the batch has {len(state.latents)}")
        self.steps.append(
            {
                "step": state.step + 1,
                "of": state.num_steps,
                "video_noise": round(1.0 - state.video_time, 4),
                "text_noise": None if state.text_time is None else round(1.0 - state.text_time, 4),
                "video": self._video(state),
                "words": None if state.text is None else self._words(state.text[self.sample]),
            }
        )

    def page(self, title: str = "Uni-ViGU") -> str:
        """The page; it needs no network and no other file.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self.steps:
            raise ValueError("nothing was recorded; pass the recorder as callback_on_step_end first")
        data = json.dumps({"title": title, "steps": self.steps}).replace("</", "<\\/")
        return files("univigu").joinpath(TEMPLATE).read_text(encoding="utf-8").replace("/*DATA*/null", data)

    def save(self, path: str | Path, title: str = "Uni-ViGU") -> Path:
        """Write the page to a file.

        Raises:
            ValueError: nothing was recorded.
        """
        page, path = self.page(title), Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        return path

    @torch.no_grad()
    def _video(self, state: StepState) -> str:
        """The state, decoded, as an animated picture in a data URL."""
        if state.video_time == 1.0 and self._clean is not None:
            return self._clean
        latents = state.latents[self.sample : self.sample + 1]
        clip = to_frames(Conventions.of(self.pipe.transformer.config).decode(self.pipe.vae, latents))[0]
        size = (clip.shape[-1] * self.scale, clip.shape[-2] * self.scale)
        pictures = [
            Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()).resize(size, Image.Resampling.NEAREST)
            for frame in clip
        ]
        buffer = io.BytesIO()
        pictures[0].save(
            buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=1000 // self.fps, loop=0, quality=80
        )
        url = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        if state.video_time == 1.0:
            self._clean = url
        return url

    def _words(self, text: torch.Tensor) -> list[str]:
        """The state's tokens as text, one string each; a mask is "", padding shows nothing, "\ufffd" is no token.

        A model may know more ids than its tokenizer (an embedding rounded up in size), which noise and a model that
        has not learned otherwise do name.
        """
        if text.is_floating_point():
            model = self.pipe.transformer
            text = (text.float() @ model.token_table().T).argmax(-1)
        tokenizer, words = self.pipe.tokenizer, []
        for token in text.tolist():
            if token == tokenizer.eos_token_id and "" not in words:
                words.append("■")
                break
            if token == tokenizer.pad_token_id:
                words.append("\u200b")  # takes no room
                continue
            if token >= self.pipe.transformer.config.vocab_size:
                words.append("")
                continue
            piece = tokenizer.convert_ids_to_tokens(token)
            words.append("\ufffd" if piece is None else piece.replace("▁", " "))
        return words
