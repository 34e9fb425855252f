"""Synthesis of shards: prompts, clips of a text-to-video pipeline, captions, and length filters."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from univigu.data.engine import exclusive
from univigu.data.inputs import read_list, text_of
from univigu.data.options import LengthFilter, check_dtype, check_least
from univigu.data.sample import DataError
from univigu.data.shards import Engine, Manifest, ShardInfo, build_folder, sha256_of, write_shard
from univigu.data.video import encode_mp4, even_indices, to_uint8
from univigu.models.fingerprint import folder_fingerprint
from univigu.models.tokens import token_count

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
class VideoOptions:
    """How clips are generated."""

    height: int = 64
    """Pixels, even."""
    width: int = 64
    """Pixels, even."""
    num_frames: int = 9
    """Frames of a clip; 4k+1 for Wan."""
    fps: int = 8
    """Frames a second of the files; 16 for Wan2.1."""
    steps: int = 20
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance; default: the pipeline's."""
    negative_prompt: str | None = None
    """Default: the pipeline's."""
    batch_size: int = 4
    """Clips generated at once; other sizes round differently."""
    videos_per_prompt: int = 1
    """Clips of each prompt, each with its own seed."""
    seed: int = 0
    """Seed of the first clip; the others count up."""
    dtype: str = "float32"
    """Of generator and captioner: float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        check_least(self, height=2, width=2, num_frames=1, fps=1, steps=1, guidance_scale=0, seed=0)
        check_least(self, batch_size=1, videos_per_prompt=1)
        for name, value in (("height", self.height), ("width", self.width)):
            if value % 2:
                raise ValueError(f"{name}={value}: expected an even number")
        check_dtype(self.dtype)


@dataclass(eq=False)
class Pipeline:
    """A folder's pipeline, ours or any text-to-video one of diffusers; a DataError for another folder."""

    folder: str
    options: VideoOptions
    device: str
    option: str = "--pipeline"
    """Option that named the folder, for messages."""

    def __post_init__(self) -> None:
        try:
            index = json.loads((Path(self.folder) / "model_index.json").read_text())
            unified = "UniViGUTransformer3DModel" in index.get("transformer", ())
            self.class_name = "UniViGUPipeline" if unified else str(index["_class_name"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            problem = f"no folder of a diffusers pipeline (model_index.json: {error}); tools/convert.py writes one"
            raise DataError(f"{self.option}={self.folder!r}: {problem}") from error

    @cached_property
    def pipe(self) -> Any:
        from diffusers import DiffusionPipeline

        from univigu.models.weights import check_files
        from univigu.pipeline import UniViGUPipeline

        kind = UniViGUPipeline if self.class_name == "UniViGUPipeline" else DiffusionPipeline
        try:
            check_files(Path(self.folder), subfolders=True)
            dtype = check_dtype(self.options.dtype)
            pipe: Any = kind.from_pretrained(self.folder, torch_dtype=dtype).to(self.device)
        except Exception as error:  # of many types, as in univigu.models.weights.reading
            raise DataError(f"{self.option}={self.folder!r}: cannot be loaded ({error})") from error
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @exclusive("generator")
    def clips(self, prompts: list[str], seeds: list[int], **more: Any) -> list[torch.Tensor | None]:
        """uint8 frames [F, C, H, W] of each prompt; None where they are not finite.

        Every clip has its own generator on the CPU, so that a seed gives the same noise on any device and in any batch.
        Arguments in ``more`` are passed on if the pipeline knows them.
        """
        from diffusers import WanPipeline

        o, pipe = self.options, self.pipe
        arguments: dict[str, Any] = {"prompt": prompts, "num_inference_steps": o.steps, "output_type": "pt"}
        arguments |= {"height": o.height, "width": o.width, "num_frames": o.num_frames}
        arguments["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        if o.guidance_scale is not None:
            arguments["guidance_scale"] = o.guidance_scale
        if o.negative_prompt is not None:
            arguments["negative_prompt"] = [o.negative_prompt] * len(prompts)
        # UniViGUPipeline's own has **kwargs.
        call = WanPipeline.__call__ if isinstance(pipe, WanPipeline) else pipe.__call__
        known = inspect.signature(call).parameters
        if unknown := sorted(arguments.keys() - known):
            raise DataError(f"{type(pipe).__name__} makes no video of a text; it takes no {unknown}")
        more = {name: more[name] for name in more.keys() & known}
        videos = pipe(**arguments, **more).frames  # [B, F, C, H, W] in [0, 1]
        return [to_uint8(video).cpu() if torch.isfinite(video).all() else None for video in videos]

    @exclusive("generator")
    def token_counts(self, texts: list[str]) -> list[int]:
        """Tokens of texts by the pipeline's tokenizer; 0 without one."""
        tokenizer = getattr(self.pipe, "tokenizer", None)
        return [0 if tokenizer is None else len(tokenizer(text, verbose=False)["input_ids"]) for text in texts]


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


def derived_seed(seed: int, attempt: int) -> int:
    """A hash of the clip's seed and the attempt, so that neighbours are independent."""
    return int.from_bytes(hashlib.sha256(repr((seed, attempt)).encode()).digest()[:6], "little")


class CaptionModel:
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
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from univigu.models.weights import check_files

        try:
            check_files(self.folder)
            processor = AutoProcessor.from_pretrained(self.folder, trust_remote_code=False)
            if getattr(processor, "chat_template", None) is None:
                raise ValueError("its processor has no chat template")
            options = {"dtype": check_dtype(self.dtype), "trust_remote_code": False}
            model = AutoModelForImageTextToText.from_pretrained(self.folder, **options)
        except Exception as error:  # likewise
            raise DataError(f"--captioner={str(self.folder)!r}: cannot be loaded ({error})") from error
        return model.requires_grad_(False).eval().to(self.device), processor

    @exclusive("captioner")
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
        return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def messages(self, prompt: str, num_images: int) -> list[dict[str, Any]]:
        """The message to the model: placeholders of the frames, then the instruction with the prompt."""
        for token in self.model[1].tokenizer.all_special_tokens:  # "<image>" would ask for one frame more
            prompt = prompt.replace(token, " ")
        text = self.options.instruction.format(prompt=prompt, num_frames=num_images, words=self.words)
        return [{"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}]


@dataclass
class Synthesis:
    """Makes clips and captions from a file of prompts; a clip's number decides its prompt and its seed.

    Texts outside of the length filter's windows are skipped and counted.  Without a captioner captions are empty and
    not filtered: enough for stages whose target is the prompt.
    """

    prompts: str
    """File: .txt, .jsonl, .json, .csv or .parquet."""
    pipeline: Pipeline
    captioner: CaptionModel | Literal["template"] | None = None
    tokenizer_folder: str | None = None
    """Of the tokenizer that counts lengths; None is the pipeline's."""
    length_filter: LengthFilter = LengthFilter()  # noqa: RUF009

    def __post_init__(self) -> None:
        self.rows = [text_of(row, "prompt") for row in read_list(self.prompts, "--prompts")]
        self.options = self.pipeline.options
        folder = self.tokenizer_folder or f"{self.pipeline.folder}/tokenizer"
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # likewise
            raise DataError(f"--tokenizer={folder!r}: cannot be loaded ({error})") from error
        self.tokenizer_fingerprint = folder_fingerprint(folder)
        token_count(self.tokenizer, "")  # ends its own truncation and padding, which two threads could not

    def write(self, output: str | Path, shard_size: int = 100, engine: Engine = map) -> Manifest:
        """Fill a folder with shards; complete shards stay, missing ones are written.

        A shard depends on nothing outside of it: its bytes do not depend on interruptions and the engine.
        ``shard_size`` includes skipped clips.
        """
        if shard_size < 1:
            raise ValueError(f"shard_size={shard_size}: expected at least 1")
        numbers = range(len(self.rows) * self.options.videos_per_prompt)
        starts = numbers[::shard_size]
        jobs = {f"clips-{i:06d}.tar": numbers[start : start + shard_size] for i, start in enumerate(starts)}
        file, generator = Path(self.prompts), Path(self.pipeline.folder)
        template = {"template": TEMPLATE} if self.captioner == "template" else None
        parameters = {
            "prompts": {"file": file.name, "rows": len(self.rows), "sha256": sha256_of(file)},
            "generator": {"folder": generator.resolve().name, "fingerprint": folder_fingerprint(generator)},
            "video": asdict(self.options),
            "captioner": self.captioner.parameters() if isinstance(self.captioner, CaptionModel) else template,
            "tokenizer": self.tokenizer_fingerprint,
            "length_filter": asdict(self.length_filter),
            "shard_size": shard_size,
        }
        return build_folder(Path(output), Manifest("video", parameters), jobs, self, engine)

    def __call__(self, path: Path, numbers: range) -> ShardInfo:
        skipped: list[dict[str, str]] = []
        info = write_shard(path, self.samples(numbers, skipped))
        info.skipped = sorted(skipped, key=lambda row: row["key"])
        return info

    def samples(self, numbers: range, skipped: list[dict[str, str]]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        """Keys and members of the clips of these numbers; those that are left out become rows of ``skipped``."""

        def skip(number: int, reason: str, field: str, value: str) -> None:
            skipped.append({"reason": reason, "key": f"{number:08d}", "field": field, "value": value[:200]})

        todo, o, window = list[tuple[int, str]](), self.options, self.length_filter
        for number in numbers:
            prompt, error = self.rows[number // o.videos_per_prompt]
            length = token_count(self.tokenizer, prompt)
            if error is not None:
                skip(number, "invalid_prompt", "prompt", error)
            elif reason := window.reason(length, window.min_caption):
                skip(number, reason, "prompt", f"{length} tokens: {prompt}")
            else:
                todo.append((number, prompt))
        for start in range(0, len(todo), o.batch_size):
            batch = todo[start : start + o.batch_size]
            prompts, seeds = [prompt for _, prompt in batch], [o.seed + number for number, _ in batch]
            videos = self.pipeline.clips(prompts, seeds)
            for (number, prompt), seed, frames in zip(batch, seeds, videos, strict=True):
                if frames is None:
                    skip(number, "not_finite", "video", f"seed {seed}: {prompt}")
                    continue
                texts, problem = self.describe(frames, prompt, seed)
                if problem is None:
                    yield f"{number:08d}", {"mp4": encode_mp4(frames, o.fps), "json": json.dumps(texts).encode()}
                else:
                    skip(number, problem[0], "caption", problem[1])
            done = start + len(batch)
            print(f"clips {numbers[0]} to {numbers[-1]}: {done}/{len(todo)}", file=sys.stderr, flush=True)

    def describe(self, frames: torch.Tensor, prompt: str, seed: int) -> tuple[dict[str, Any], tuple[str, str] | None]:
        """The json member; and, if no attempt gave a caption in the window of lengths, (reason, the last caption)."""
        texts: dict[str, Any] = {"prompt": prompt, "caption": "", "seed": seed}
        if self.captioner is None:
            return texts, None
        problem, size = None, dict(zip(("num_frames", "channels", "height", "width"), frames.shape, strict=True))
        for attempt in range(1 if self.captioner == "template" else self.captioner.tries):
            if self.captioner == "template":
                texts["caption"] = TEMPLATE.format(prompt=prompt.strip(" ."), fps=self.options.fps, **size)
            else:
                texts["caption_seed"] = derived_seed(seed, attempt)
                texts["caption"] = self.captioner.describe(frames, prompt, texts["caption_seed"])
            length = token_count(self.tokenizer, texts["caption"])
            reason = self.length_filter.reason(0, length)
            if reason is None:
                return texts, None
            problem = reason, f"{length} tokens: {texts['caption']}"
        return texts, problem
