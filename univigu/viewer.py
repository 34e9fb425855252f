"""The sampling steps of one sample as an HTML file: a slider over the steps, the video and the text of each.

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
from univigu.models.tokens import Vocabulary
from univigu.sampling.sampler import StepState

FPS = 8


class TrajectoryRecorder:
    """Keeps the intermediate states of a batch's first sample; give it to a task as ``callback_on_step_end``.

    Args:
        pipe: the pipeline whose VAE and tokenizer read the states.
        every: keep every so many steps, at least 1; the last one is always kept.
        scale: enlargement of the video, at least 1.
    """

    def __init__(self, pipe: Any, every: int = 1, scale: int = 4) -> None:
        self.pipe, self.every, self.scale = pipe, every, scale
        self.steps: list[dict[str, Any]] = []
        self._last: tuple[torch.Tensor, str] | None = None  # a caption's video is the same at every step

    def __call__(self, pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's callback, of the tasks and of WanPipeline's own call."""
        state = tensors.get("state")
        if state is None:
            video_time, total = 1.0 - float(pipe.scheduler.sigmas[step + 1]), pipe.num_timesteps
            state = StepState(step, total, tensors["latents"], video_time, None, None, step + 1 == total)
        if state.step % self.every == 0 or state.last:
            self.steps.append(
                {
                    "step": state.step + 1,
                    "of": state.num_steps,
                    "video_noise": round(1.0 - state.video_time, 4),
                    "text_noise": None if state.text_time is None else round(1.0 - state.text_time, 4),
                    "video": self._video(state),
                    "words": None if state.text is None else self._words(state.text[0]),
                }
            )
        return {}  # no tensor is replaced

    def page(self) -> str:
        """The page; it needs no network and no other file. Raises ValueError if nothing was recorded."""
        if not self.steps:
            raise ValueError("nothing was recorded; pass the recorder as callback_on_step_end first")
        data = json.dumps({"steps": self.steps}).replace("<", "\\u003c")  # tags and comments in texts
        template = files("univigu").joinpath("assets/trajectory.html").read_text(encoding="utf-8")
        return template.replace("/*DATA*/null", data)

    def save(self, path: str | Path) -> None:
        """Write the page to a file."""
        page, path = self.page(), Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")

    @torch.no_grad()
    def _video(self, state: StepState) -> str:
        """The decoded state as an animated picture in a data URL."""
        latents = state.latents[:1]
        if self._last is not None and torch.equal(latents, self._last[0]):
            return self._last[1]
        clip = to_frames(self.pipe.conventions.decode(self.pipe.vae, latents))[0]
        buffer = io.BytesIO()
        first, *others = enlarged(clip.cpu(), self.scale)
        first.save(buffer, "WEBP", save_all=True, append_images=others, duration=1000 // FPS, loop=0, quality=80)
        url = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        self._last = latents.clone(), url
        return url

    def _words(self, text: torch.Tensor) -> list[str]:
        """One string for each token: a mask is "", padding has no width, U+FFFD is no token of the tokenizer.

        A model may have more ids than its tokenizer (an embedding with a rounded-up size), and noise contains them.
        """
        tokenizer, model = self.pipe.tokenizer, self.pipe.transformer
        words: list[str] = []
        if text.is_floating_point():
            text = (text.float() @ model.token_table().T).argmax(-1)
        mask = text >= model.config.vocab_size
        for token in Vocabulary(model.config.token_ids).decode(text).masked_fill(mask, -1).tolist():
            if token == tokenizer.eos_token_id and "" not in words:
                return [*words, "■"]
            if token == tokenizer.pad_token_id:
                words.append("\u200b")
            elif token < 0:
                words.append("")
            else:
                piece = tokenizer.convert_ids_to_tokens(token)
                words.append("\ufffd" if piece is None else piece.replace("▁", " "))
        return words


def enlarged(frames: torch.Tensor, scale: int) -> list[Image.Image]:
    """Frames uint8 [F, C, H, W] as pictures, each pixel repeated ``scale`` times in both directions."""
    size = (frames.shape[-1] * scale, frames.shape[-2] * scale)
    return [Image.fromarray(f.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.NEAREST) for f in frames]
