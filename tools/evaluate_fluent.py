"""Evaluate a model of the animated emoji (tools/prepare_fluent.py) without rules that check pixels.

    python tools/evaluate_fluent.py data/fluent --model runs/fluent/model --judge runs/fluent/judge --output runs/fluent

Texts are read by the two sentences that the data set writes, and compared with the clip.  A generated video is judged
by the nearest true clip of all splits, in pixels and in latents, and by the captions of another model, which was
trained on true clips only.  Every figure is given with that of a random clip, and those of captions also with that of
true clips.  Results are written after each task; a task that has its results is not done again.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from univigu.cli import ToolParser
from univigu.data.buckets import Bucket
from univigu.data.index import find_split, index_folder
from univigu.data.progress import track
from univigu.data.sample import TEXT_SUFFIX
from univigu.data.video import even_indices, to_model_range, to_uint8
from univigu.pipeline import UniViGUPipeline

ATTRIBUTES = ("name", "role", "gender", "tone", "background")
SUBJECT = re.compile(
    r"^(?:the animation shows an? )?(?P<name>.+?)(?: with (?P<tone>[\w-]+) skin)?"
    r"(?: in front of a plain|, on a) (?P<background>\w+) background"
)
BATCH = 16
Attributes = dict[str, str]
Rows = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Clip:
    """A true clip: uint8 [F, C, H, W], its texts, and what it shows; "" for an attribute that it does not have."""

    video: Tensor
    texts: dict[str, Any]
    shown: Attributes


def read_clips(folder: Path, split: str, size: dict[str, int]) -> list[Clip]:
    """All clips of a split."""
    clips = []
    for ref in track(index_folder(find_split(folder, split))[0], f"reading {split}"):
        texts = json.loads(ref.read(TEXT_SUFFIX))
        shown = {name: str(texts["emoji"][name]).lower() for name in ATTRIBUTES}
        clips.append(Clip(ref.video(**size).contiguous(), texts, shown))
    return clips


def spread(clips: Sequence[Clip], count: int) -> list[Clip]:
    """Up to ``count`` clips, spread evenly."""
    return [clips[i] for i in even_indices(len(clips), min(count, len(clips)))]


def videos_of(clips: Iterable[Clip]) -> Tensor:
    """Their videos, uint8 [B, F, C, H, W]."""
    return torch.stack([clip.video for clip in clips])


def batches(items: Any, name: str) -> Iterator[tuple[int, Any]]:
    """Parts of a list or tensor, each with the number of its first item."""
    for start in track(range(0, len(items), BATCH), name):
        yield start, items[start : start + BATCH]


def read_text(text: str, people: dict[str, Attributes]) -> Attributes:
    """What a prompt or caption says; ``people`` has role and gender by name."""
    found = SUBJECT.match(text.lower().strip())
    said = {name: value or "" for name, value in found.groupdict().items()} if found else {}
    return {**dict.fromkeys(ATTRIBUTES, ""), **said, **people.get(said.get("name", ""), {})}


def accuracy(found: Iterable[Attributes], asked: Iterable[Attributes]) -> dict[str, float]:
    """Percentages of attributes that are found as asked, of those that have them; "all" is role, gender and tone."""
    right: dict[str, list[bool]] = {name: [] for name in (*ATTRIBUTES, "all")}
    for a, b in zip(found, asked, strict=True):
        for name in ATTRIBUTES:
            if b[name]:
                right[name].append(a[name] == b[name])
        if b["role"]:
            right["all"].append(all(a[name] == b[name] for name in ("role", "gender", "tone")))
    return {name: round(100 * sum(values) / len(values), 1) for name, values in right.items() if values}


def chance(asked: Sequence[Attributes], clips: Sequence[Clip]) -> dict[str, float]:
    """The accuracies of random clips."""
    chosen = torch.randint(len(clips), (20, len(asked)), generator=torch.Generator().manual_seed(0)).flatten()
    return accuracy([clips[i].shown for i in chosen], [*asked] * 20)


@cache  # the judge may be the model itself
def load(folder: str) -> UniViGUPipeline:
    pipe = UniViGUPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Evaluation:
    """The tasks by name; each returns rows of accuracies."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.size = options, asdict(Bucket.parse(options.size))
        self.sampling = {"guidance_scale": 2.0, "num_inference_steps": options.steps, "output_type": "pt"}
        self.pipe, self.judge = load(options.model), load(options.judge) if options.judge else None
        self.clips = {split: read_clips(options.data, split, self.size) for split in ("train", "val", "test")}
        self.everything = [clip for clips in self.clips.values() for clip in clips]
        self.people = {
            clip.shown["name"]: {name: clip.shown[name] for name in ("role", "gender")} for clip in self.everything
        }
        persons = [clip for clip in self.clips["train"] if clip.shown["role"]]
        self.prompts = {
            "trained triples": spread(persons, options.clips),
            "held-out triples": spread(self.clips["test"], options.clips),
        }

    def features(self, videos: Tensor) -> dict[str, Tensor]:
        """uint8 [B, F, C, H, W] -> frames at half the size, and latents, float32 [B, D] each."""
        small = F.avg_pool2d(videos.flatten(0, 1).float() / 255, 2).unflatten(0, videos.shape[:2])
        latents = self.pipe.vae.encode(to_model_range(videos)).latent_dist.mode()
        return {"pixels": small.flatten(1), "latents": latents.flatten(1)}

    @cached_property
    def known(self) -> dict[str, Tensor]:
        """Features of all true clips."""
        parts = [self.features(videos_of(batch)) for _, batch in batches(self.everything, "features")]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def nearest(self, videos: Tensor) -> Iterator[tuple[str, list[Attributes]]]:
        """By each feature, what those true clips show that are nearest to videos, by squared distance."""
        for name, values in self.features(videos).items():
            yield name, [self.everything[i].shown for i in torch.cdist(values, self.known[name]).argmin(1)]

    def describe(self, pipe: UniViGUPipeline, videos: Tensor) -> list[Attributes]:
        """What a model's captions of uint8 videos [B, F, C, H, W] say."""
        outputs = [pipe.caption(part, **self.start(number)) for number, part in batches(videos, "captions")]
        return [read_text(text, self.people) for output in outputs for text in output.text or []]

    def start(self, seed: int) -> dict[str, Any]:
        """Options that all tasks have."""
        return {"generator": torch.Generator().manual_seed(seed), "max_sequence_length": self.options.prompt_length}

    def made(self, task: Callable[..., Any], clips: list[Clip], name: str) -> tuple[Tensor, list[Attributes]]:
        """Videos uint8 [B, F, C, H, W] from the clips' prompts, and what the texts say if the task makes any."""
        videos, said = list[Tensor](), list[Attributes]()
        for number, batch in batches(clips, name):
            prompts = [clip.texts["prompt"] for clip in batch]
            start = {"video": videos_of(batch)} if task == self.pipe.edit else self.size
            output = task(prompt=prompts, **start, **self.sampling, **self.start(number))
            videos.append(to_uint8(output.frames))
            said += [read_text(text, self.people) for text in output.get("text", [])]
        return torch.cat(videos), said

    def judged(self, videos: Tensor, asked: list[Attributes], of: str) -> Rows:
        """Accuracies of generated videos by every judge."""
        rows = {f"{of}: nearest clip, {name}": accuracy(found, asked) for name, found in self.nearest(videos)}
        if self.judge:
            rows[f"{of}: captions of the judge"] = accuracy(self.describe(self.judge, videos), asked)
        return rows | {f"{of}: chance": chance(asked, self.everything)}

    # ----------------------------------------------------------------- tasks

    def caption(self) -> Rows:
        rows: Rows = {}
        for split, kind in (("val", "other backgrounds"), ("test", "held-out triples")):
            chosen = spread(self.clips[split], self.options.clips)
            videos, asked = videos_of(chosen), [clip.shown for clip in chosen]
            rows[f"captions, {kind}"] = accuracy(self.describe(self.pipe, videos), asked)
            if self.judge and self.judge is not self.pipe:  # else its row would be the first one again
                rows[f"captions of the judge, {kind}"] = accuracy(self.describe(self.judge, videos), asked)
            rows[f"captions, {kind}: chance"] = chance(asked, self.everything)
        return rows

    def generate(self) -> Rows:
        rows: Rows = {}
        for kind, chosen in self.prompts.items():
            videos, _ = self.made(self.pipe, chosen, f"videos, {kind}")
            rows |= self.judged(videos, [clip.shown for clip in chosen], f"videos, {kind}")
        return rows

    def joint(self) -> Rows:
        rows: Rows = {}
        for kind, chosen in self.prompts.items():
            videos, said = self.made(self.pipe.joint, chosen, f"both, {kind}")
            rows[f"joint, {kind}: text and prompt"] = accuracy(said, [clip.shown for clip in chosen])
            rows |= self.judged(videos, said, f"joint, {kind}, video and text")
        return rows

    def edit(self) -> Rows:
        """Another background or skin tone for clips of val."""
        rows: Rows = {}
        people = [clip for clip in self.clips["val"] if clip.shown["role"]]
        for name, noun in (("background", "background"), ("tone", "skin")):
            values, wanted = sorted({clip.shown[name] for clip in people}), list[Clip]()
            for clip in spread(people, self.options.clips):
                old = clip.shown[name]
                new = values[(values.index(old) + 1) % len(values)]
                prompt = clip.texts["prompt"].replace(f"{old} {noun}", f"{new} {noun}")
                wanted.append(Clip(clip.video, {"prompt": prompt}, {**clip.shown, name: new}))
            videos, _ = self.made(self.pipe.edit, wanted, f"edits of the {name}")
            rows |= self.judged(videos, [clip.shown for clip in wanted], f"edits of the {name}")
        return rows

    def answer(self) -> Rows:
        """Exact answers by kind of question."""
        right: dict[str, list[bool]] = {}
        for clip in track(spread(self.clips["test"], self.options.clips), "answers"):
            questions = [pair["question"] for pair in clip.texts["qa"]]
            answers = self.pipe.answer(clip.video, questions, **self.start(0))
            for pair, answer in zip(clip.texts["qa"], answers.text or [], strict=True):
                right.setdefault(pair["kind"], []).append(answer.strip() == pair["answer"].lower())
        return {"answers, held-out triples": {kind: round(100 * sum(r) / len(r), 1) for kind, r in right.items()}}


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    evaluation = None
    for task in options.tasks:
        if task not in results:
            evaluation = evaluation or Evaluation(options)
            results[task] = getattr(evaluation, task)()
            file.write_text(json.dumps(results, indent=1))
        for row, values in results[task].items():
            print(f"{row}: " + ", ".join(f"{name} {value}" for name, value in values.items()))


def main(args: list[str] | None = None) -> int:
    tasks = ["caption", "generate", "joint", "edit", "answer"]
    parser = ToolParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder that tools/prepare_fluent.py wrote")
    parser.add_argument("--model", required=True, help="folder of a pipeline (tools/convert.py pipeline)")
    parser.add_argument("--judge", help="folder of another pipeline, trained on true clips only")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--clips", type=int, default=200, help="clips or prompts of each row")
    parser.add_argument("--size", default="64x64x9", help="HEIGHTxWIDTHxFRAMES of the model's clips")
    parser.add_argument("--prompt-length", type=int, default=128, help="slot of the prompt in tokens, as in training")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps of videos")
    return parser.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
