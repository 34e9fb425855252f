"""Captions of clips: a template, or a transformers model that is shown frames and the prompt."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from univigu.data.engine import Model
from univigu.data.filters import LengthFilter
from univigu.data.options import check_dtype, check_least
from univigu.data.sample import DataError
from univigu.data.video import even_indices
from univigu.models.fingerprint import folder_fingerprint

INSTRUCTION = (
    "These are {num_frames} frames of one video, in order. It was made from this prompt: {prompt}\n"
    "Describe the video in one detailed paragraph of about {words} words: its subjects and their looks, how they move "
    "from the first frame to the last, the background, the light, the camera. Do not contradict the prompt, add what "
    "only the frames show, and write nothing but the description."
)
TEMPLATE = (
    "the video shows {prompt}. the clip is {num_frames} frames long, {width} pixels wide and {height} pixels high, and "
    "is played at {fps} frames a second. from the first frame to the last it shows the same scene: {prompt}. the "
    "picture is one continuous shot without cuts, the camera does not move, and there is no text in the picture. "
    "nothing else enters or leaves the frame, the light is even, and the background stays as it is while the clip "
    "lasts."
)


@dataclass(frozen=True)
class CaptionOptions:
    """How a language model writes captions."""

    frames: int = 8
    """Frames of the clip, evenly spaced, that the model is shown."""
    tries: int = 4
    """Attempts, each with another seed, until the caption's length is in the window."""
    max_new_tokens: int = 400
    """Most tokens (of the language model) of a caption."""
    temperature: float = 0.7
    """Sampling temperature; 0 takes the likeliest token, and there is one attempt."""
    top_p: float = 0.9
    """Nucleus sampling."""
    instruction: str = INSTRUCTION
    """Request to the language model, with {prompt}, {num_frames} and {words}."""

    def __post_init__(self) -> None:
        check_least(self, frames=1, tries=1, max_new_tokens=1, temperature=0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a number in (0, 1]")
        try:
            self.instruction.format(prompt="", num_frames=1, words=1)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"instruction: expected only {{prompt}}, {{num_frames}}, {{words}} ({error!r})") from error


@dataclass(frozen=True)
class Template:
    """Fills in a text that is the same for every clip."""

    fps: int
    tries: int = 1

    def parameters(self) -> dict[str, Any]:
        return {"template": TEMPLATE}

    def describe(self, frames: torch.Tensor, prompt: str, seed: int) -> str:
        num_frames, _, height, width = frames.shape
        size = {"num_frames": num_frames, "height": height, "width": width, "fps": self.fps}
        return TEMPLATE.format(prompt=prompt.strip(" ."), **size)


def derived_seed(seed: int, attempt: int) -> int:
    """A hash of the clip's seed and the attempt, so that neighbours are independent."""
    return int.from_bytes(hashlib.sha256(repr((seed, attempt)).encode()).digest()[:6], "little")


class CaptionModel(Model):
    """A transformers image-text-to-text model and its processor, in one folder; it is shown frames as images."""

    def __init__(
        self, folder: str, options: CaptionOptions, window: LengthFilter, dtype: str = "float32", device: str = "cpu"
    ) -> None:
        self.folder, self.options, self.dtype, self.device = Path(folder), options, dtype, device
        self.words = round(0.375 * (window.min_caption + window.max_caption))  # three words make about four tokens
        self.tries = options.tries if options.temperature > 0 else 1
        if not (self.folder / "config.json").is_file():
            expected = "expected 'none', 'template', or the folder of a transformers model with its config.json"
            raise DataError(f"--captioner={folder!r}: {expected}")

    def parameters(self) -> dict[str, Any]:
        """What the captions depend on, for the manifest."""
        model = {"folder": self.folder.resolve().name, "fingerprint": folder_fingerprint(self.folder)}
        return model | {"dtype": self.dtype, "words": self.words, **asdict(self.options)}

    @cached_property
    def model(self) -> tuple[Any, Any]:
        """Model and processor."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from univigu.models.weights import check_files

        try:
            check_files(self.folder)
            processor = AutoProcessor.from_pretrained(self.folder, trust_remote_code=False)
            if getattr(processor, "chat_template", None) is None:
                raise ValueError("its processor has no chat template")
            options = {"dtype": check_dtype(self.dtype), "trust_remote_code": False}
            model = AutoModelForImageTextToText.from_pretrained(self.folder, **options)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise DataError(f"--captioner={str(self.folder)!r}: cannot be loaded ({error})") from error
        return model.requires_grad_(False).eval().to(self.device), processor

    def describe(self, frames: torch.Tensor, prompt: str, seed: int) -> str:
        """A caption of frames uint8 [F, C, H, W]."""
        o, (model, processor) = self.options, self.model
        chosen = sorted(set(even_indices(len(frames), o.frames)))
        images = [Image.fromarray(frames[i].permute(1, 2, 0).numpy()) for i in chosen]
        question = processor.apply_chat_template(self.messages(prompt, len(images)), add_generation_prompt=True)
        # The chat template has written the special tokens.
        inputs = processor(text=[question], images=[images], return_tensors="pt", add_special_tokens=False)
        inputs = inputs.to(self.device, dtype=model.dtype)
        draw: dict[str, Any] = {"do_sample": o.temperature > 0}
        if o.temperature > 0:
            draw |= {"temperature": o.temperature, "top_p": o.top_p, "top_k": 0}
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            tokens = model.generate(**inputs, max_new_tokens=o.max_new_tokens, **draw)
        text: str = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip()

    def messages(self, prompt: str, num_images: int) -> list[dict[str, Any]]:
        """The message to the model: placeholders of the frames, then the instruction with the prompt."""
        for token in self.model[1].tokenizer.all_special_tokens:  # "<image>" would ask for one frame more
            prompt = prompt.replace(token, " ")
        text = self.options.instruction.format(prompt=prompt, num_frames=num_images, words=self.words)
        return [{"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}]
