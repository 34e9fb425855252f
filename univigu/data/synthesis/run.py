"""Synthesis itself: clips, captions and filters, one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from univigu.data.build import build_folder
from univigu.data.filters import LengthFilter
from univigu.data.processes import ONLY, Share, progress_bar
from univigu.data.sample import DataError
from univigu.data.shards import Manifest, ShardInfo, write_shard
from univigu.data.synthesis.captioners import Captioner
from univigu.data.synthesis.sources import Clip, Rejection, Source
from univigu.data.video import encode_mp4
from univigu.models.fingerprint import folder_fingerprint
from univigu.models.tokens import token_count


def synthesize(
    output: str | Path,
    source: Source,
    captioner: Captioner,
    tokenizer_folder: str | Path,
    length_filter: LengthFilter,
    shard_size: int = 100,
    share: Share = ONLY,
) -> Manifest:
    """Fill a folder with shards of clips and captions; complete shards stay, missing ones are made.

    A shard depends on nothing outside of it: its bytes do not depend on interruptions and the number of processes.

    Args:
        output: where the shards and their manifest go.
        source: gives the clips.
        captioner: writes the captions, up to ``captioner.tries`` times while one misses the window.
        tokenizer_folder: counts the tokens.
        length_filter: the windows of lengths; texts that miss them are left out and counted.
        shard_size: clips of a shard, those that are left out included.
        share: which of several processes this one is.

    Returns:
        the manifest, complete unless other processes have shards left to write.

    Raises:
        DataError: the folder holds something else, or a model cannot be loaded.
        ValueError: ``shard_size`` is below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}: expected at least 1")
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer={str(tokenizer_folder)!r}: cannot be loaded ({error})") from error
    parameters = {
        **source.parameters(),
        **captioner.parameters(),
        "tokenizer": folder_fingerprint(tokenizer_folder),
        "length_filter": asdict(length_filter),
        "shard_size": shard_size,
        "captions_filtered": captioner.filtered,
    }
    jobs = {}
    for number, start in enumerate(range(0, len(source), shard_size)):
        jobs[f"clips-{number:06d}.tar"] = range(start, min(start + shard_size, len(source)))
    progress = progress_bar()
    writer = _ShardWriter(source, captioner, tokenizer, length_filter, progress)
    manifest = Manifest("video", parameters)
    return build_folder(Path(output), manifest, jobs, writer.write, None, "shards", share, progress)


@dataclass
class _ShardWriter:
    """Makes single shards; see :func:`synthesize` for the arguments."""

    source: Source
    captioner: Captioner
    tokenizer: PreTrainedTokenizerBase
    length_filter: LengthFilter
    progress: Progress

    def write(self, path: Path, numbers: range) -> ShardInfo:
        """Make and write the shard of these clips."""
        rejected: list[dict[str, Any]] = []
        info = write_shard(path, self._samples(numbers, rejected))
        info.skipped = sorted(rejected, key=lambda row: row["key"])
        return info

    def _samples(self, numbers: range, rejected: list[dict[str, Any]]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        clips: list[Clip] = []
        for number in numbers:
            try:
                clips.append(self._clip(number))
            except Rejection as rejection:
                rejected.append(rejection.row)
        size = self.source.options.batch_size
        task = self.progress.add_task("clips of this shard", total=len(clips))
        for start in range(0, len(clips), size):
            batch = clips[start : start + size]
            self.source.render(batch)
            self._describe([clip for clip in batch if clip.frames is not None])
            for clip in batch:
                try:
                    self._check(clip)
                    yield clip.key, self._members(clip)
                except Rejection as rejection:
                    rejected.append(rejection.row)
                clip.frames = None
            self.progress.advance(task, len(batch))
        self.progress.remove_task(task)

    def _clip(self, number: int) -> Clip:
        """The clip of a number, if its prompt can be used."""
        clip = self.source.clip(number)
        length = self._tokens(clip.prompt)
        reason = self.length_filter.reason(length, self.length_filter.min_caption)
        if reason is not None:
            raise Rejection(reason, clip.key, "prompt", f"{length} tokens: {clip.prompt}")
        return clip

    def _describe(self, clips: list[Clip]) -> None:
        """Caption the clips, and those whose captions miss the window again."""
        for attempt in range(self.captioner.tries):
            if clips:
                self.captioner.describe(clips, attempt)
            clips = [clip for clip in clips if self._missed(clip) is not None]

    def _missed(self, clip: Clip) -> str | None:
        if not self.captioner.filtered:
            return None
        return self.length_filter.reason(0, self._tokens(clip.caption))

    def _check(self, clip: Clip) -> None:
        if clip.frames is None:
            raise Rejection("not_finite", clip.key, "video", f"seed {clip.seed}: {clip.prompt}")
        reason = self._missed(clip)
        if reason is not None:
            raise Rejection(reason, clip.key, "caption", f"{self._tokens(clip.caption)} tokens: {clip.caption}")

    def _tokens(self, text: str) -> int:
        return token_count(self.tokenizer, text)

    def _members(self, clip: Clip) -> dict[str, bytes]:
        assert clip.frames is not None
        texts: dict[str, Any] = {"prompt": clip.prompt, "caption": clip.caption, "seed": clip.seed}
        if clip.caption_seed is not None:
            texts["caption_seed"] = clip.caption_seed
        if clip.scene is not None:
            texts["scene"] = clip.scene
        return {
            "mp4": encode_mp4(clip.frames, self.source.options.fps, self.source.options.crf),
            "json": json.dumps(texts).encode(),
        }
