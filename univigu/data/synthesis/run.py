"""Synthesis of shards: clips, captions and length filters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from univigu.data.build import build_folder
from univigu.data.filters import LengthFilter
from univigu.data.processes import ONLY, Share, progress_bar
from univigu.data.sample import DataError
from univigu.data.shards import Manifest, ShardInfo, write_shard
from univigu.data.synthesis.captioners import TEMPLATE, CaptionModel, template_caption
from univigu.data.synthesis.sources import Clip, PromptSource
from univigu.data.video import encode_mp4
from univigu.models.fingerprint import folder_fingerprint
from univigu.models.tokens import token_count

Captioner = CaptionModel | Literal["none", "template"]
"""Captions of "none" are empty, and their lengths are not filtered: enough for stages whose target is the prompt."""


def synthesize(
    output: str | Path,
    source: PromptSource,
    captioner: Captioner,
    tokenizer_folder: str | Path,
    length_filter: LengthFilter,
    shard_size: int = 100,
    share: Share = ONLY,
) -> Manifest:
    """Fill a folder with shards of clips and captions; complete shards stay, missing ones are written.

    A shard depends on nothing outside of it: its bytes do not depend on interruptions and the number of processes.
    Texts outside of the length filter's windows are skipped and counted; ``shard_size`` includes skipped clips.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}: expected at least 1")
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer={str(tokenizer_folder)!r}: cannot be loaded ({error})") from error
    parameters = {
        **source.parameters(),
        "captioner": captioner.parameters() if isinstance(captioner, CaptionModel) else captioner,
        "tokenizer": folder_fingerprint(tokenizer_folder),
        "length_filter": asdict(length_filter),
        "shard_size": shard_size,
        "captions_filtered": captioner != "none",
    }
    if captioner == "template":
        parameters["template"] = TEMPLATE
    numbers, progress = range(len(source)), progress_bar()
    starts = numbers[::shard_size]
    jobs = {f"clips-{i:06d}.tar": numbers[start : start + shard_size] for i, start in enumerate(starts)}
    work = _ShardWriter(source, captioner, tokenizer, length_filter, progress).write
    return build_folder(Path(output), Manifest("video", parameters), jobs, work, None, "shards", share, progress)


@dataclass
class _ShardWriter:
    source: PromptSource
    captioner: Captioner
    tokenizer: PreTrainedTokenizerBase
    length_filter: LengthFilter
    progress: Progress

    def write(self, path: Path, numbers: range) -> ShardInfo:
        clips = [self.source.clip(number) for number in numbers]
        for clip in clips:
            length = token_count(self.tokenizer, clip.prompt)
            if clip.skipped is None and (reason := self.length_filter.reason(length, self.length_filter.min_caption)):
                clip.skip(reason, "prompt", f"{length} tokens: {clip.prompt}")
        info = write_shard(path, self._samples([clip for clip in clips if clip.skipped is None]))
        info.skipped = [clip.skipped for clip in clips if clip.skipped is not None]
        return info

    def _samples(self, clips: list[Clip]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        size = self.source.options.batch_size
        task = self.progress.add_task("clips of this shard", total=len(clips))
        for start in range(0, len(clips), size):
            batch = clips[start : start + size]
            self.source.render(batch)
            for clip in batch:
                if clip.frames is None:
                    clip.skip("not_finite", "video", f"seed {clip.seed}: {clip.prompt}")
                else:
                    self._describe(clip)
                if clip.skipped is None:
                    yield clip.key, self._members(clip)
                clip.frames = None
            self.progress.advance(task, len(batch))
        self.progress.remove_task(task)

    def _describe(self, clip: Clip) -> None:
        """Caption the clip, with a model up to ``tries`` times; skip it if its caption misses the window of lengths."""
        if self.captioner == "none":
            return
        for attempt in range(self.captioner.tries if isinstance(self.captioner, CaptionModel) else 1):
            if isinstance(self.captioner, CaptionModel):
                self.captioner.describe(clip, attempt)
            else:
                clip.caption = template_caption(clip, self.source.options.fps)
            length = token_count(self.tokenizer, clip.caption)
            reason = self.length_filter.reason(0, length)
            if reason is None:
                return
        clip.skip(str(reason), "caption", f"{length} tokens: {clip.caption}")

    def _members(self, clip: Clip) -> dict[str, bytes]:
        assert clip.frames is not None
        texts: dict[str, Any] = {"prompt": clip.prompt, "caption": clip.caption, "seed": clip.seed}
        if clip.caption_seed is not None:
            texts["caption_seed"] = clip.caption_seed
        return {"mp4": encode_mp4(clip.frames, self.source.options.fps), "json": json.dumps(texts).encode()}
