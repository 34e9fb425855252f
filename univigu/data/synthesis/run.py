"""Synthesis of shards: prompts, clips, captions and length filters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from univigu.data.build import Engine, build_folder
from univigu.data.filters import LengthFilter
from univigu.data.inputs import read_list, text_of
from univigu.data.sample import DataError
from univigu.data.shards import Manifest, ShardInfo, sha256_of, write_shard
from univigu.data.synthesis.captioners import CaptionModel, Template, derived_seed
from univigu.data.synthesis.sources import Pipeline, pipeline_class
from univigu.data.video import encode_mp4
from univigu.models.fingerprint import folder_fingerprint
from univigu.models.tokens import token_count


@dataclass
class Synthesis:
    """Makes clips and captions from a file of prompts; a clip's number decides its prompt and its seed.

    Texts outside of the length filter's windows are skipped and counted.  Without a captioner captions are empty and
    not filtered: enough for stages whose target is the prompt.
    """

    prompts: str
    """File: .txt, .jsonl, .json, .csv or .parquet."""
    pipeline: Pipeline
    """Generates the clips."""
    captioner: CaptionModel | Template | None = None
    tokenizer_folder: str | None = None
    """Of the tokenizer that counts lengths; None is the pipeline's."""
    length_filter: LengthFilter = LengthFilter()  # noqa: RUF009

    def __post_init__(self) -> None:
        self.rows = [text_of(row, "prompt") for row in read_list(self.prompts, "--prompts")]
        folder, self.options = self.pipeline.folder, self.pipeline.options
        pipeline_class(folder)
        tokenizer = self.tokenizer_folder or f"{folder}/tokenizer"
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise DataError(f"--tokenizer={tokenizer!r}: cannot be loaded ({error})") from error
        # Later the captioner may be in another process.
        self.tries = 0 if self.captioner is None else self.captioner.tries
        self.is_drawn = isinstance(self.captioner, CaptionModel)
        rows = {"file": Path(self.prompts).name, "rows": len(self.rows), "sha256": sha256_of(Path(self.prompts))}
        self.parameters = {
            "prompts": rows,
            "generator": {"folder": Path(folder).resolve().name, "fingerprint": folder_fingerprint(folder)},
            "video": asdict(self.options),
            "captioner": None if self.captioner is None else self.captioner.parameters(),
            "tokenizer": folder_fingerprint(tokenizer),
            "length_filter": asdict(self.length_filter),
        }
        """What the samples depend on, for the manifest."""

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
        manifest = Manifest("video", {**self.parameters, "shard_size": shard_size})
        return build_folder(Path(output), manifest, jobs, self, engine)

    def __call__(self, path: Path, numbers: range) -> ShardInfo:
        """Write the shard of the clips of these numbers."""
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
        problem = None
        for attempt in range(self.tries):
            drawn = derived_seed(seed, attempt)
            texts["caption"] = self.captioner.describe(frames, prompt, drawn)
            if self.is_drawn:
                texts["caption_seed"] = drawn
            length = token_count(self.tokenizer, texts["caption"])
            reason = self.length_filter.reason(0, length)
            if reason is None:
                return texts, None
            problem = reason, f"{length} tokens: {texts['caption']}"
        return texts, problem
