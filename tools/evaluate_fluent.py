"""Evaluate a model of the animated emoji (tools/prepare_fluent.py) without rules that check pixels.

    python tools/evaluate_fluent.py data/fluent --model runs/fluent/model --judge runs/fluent/judge --output runs/fluent

Texts are read by the two sentences that the data set writes, and compared with the clip.  A generated video is judged
by the nearest true clip of all splits, in pixels and in latents; by a small network that this program trains to name
what true clips show; and by the captions of another model, which was trained on true clips only.  Every figure is given
with that of a random clip, and those of the last two also with their figures on true clips.  Results are written after
each task; a task that has its results is not done again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univigu.cli import ToolParser, exit_code
from univigu.data.buckets import Bucket
from univigu.data.index import find_split, index_folder
from univigu.data.progress import track
from univigu.data.sample import TEXT_SUFFIX
from univigu.data.video import even_indices, to_model_range, to_uint8
from univigu.pipeline import UniViGUPipeline
from univigu.training.loop import optimize

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


class Recogniser(nn.Module):
    """A convolutional network that names what the first, middle and last frame show; it knows no other network."""

    def __init__(self, values: dict[str, list[str]]) -> None:
        super().__init__()
        self.values, widths = values, [9, 32, 64, 128, 128]
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.GELU())
            for a, b in pairwise(widths)
        ]
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3))
        self.heads = nn.ModuleDict({name: nn.Linear(16 * widths[-1], len(known)) for name, known in values.items()})

    @staticmethod
    def frames(videos: Tensor) -> Tensor:
        """uint8 [B, F, C, H, W] -> three frames, [B, 9, H, W] in [-1, 1]."""
        return videos[:, even_indices(videos.shape[1], 3)].flatten(1, 2).float() / 127.5 - 1

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Logits by attribute."""
        features = self.body(frames)
        return {name: head(features) for name, head in self.heads.items()}

    def describe(self, videos: Tensor) -> list[Attributes]:
        """uint8 [B, F, C, H, W] -> the likeliest value of every attribute."""
        best = {name: logits.argmax(1).tolist() for name, logits in self(self.frames(videos)).items()}
        return [{name: self.values[name][best[name][i]] for name in ATTRIBUTES} for i in range(len(videos))]


@torch.enable_grad()
def train_recogniser(clips: Sequence[Clip], steps: int) -> Recogniser:
    """Train on true clips, shifted and with noise, because generated videos are not exact.  Takes a minute."""
    shown, videos = [clip.shown for clip in clips], videos_of(clips)
    values = {name: sorted({row[name] for row in shown} - {""}) for name in ATTRIBUTES}
    labels = {
        name: torch.tensor([known.index(row[name]) if row[name] else -100 for row in shown])
        for name, known in values.items()
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Recogniser(values)

        def loss_of(step: int) -> Tensor:
            rows = torch.randint(len(videos), (64,))
            frames = network.frames(videos[rows]).roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
            logits = network(frames + 0.1 * torch.randn_like(frames))
            losses = [F.cross_entropy(logits[name], labels[name][rows], reduction="sum") for name in ATTRIBUTES]
            return torch.stack(losses).sum() / len(rows)

        optimize("recogniser", network, loss_of, steps, 2e-3, weight_decay=0.05)
    return network.eval()


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
        self.features: dict[str, Callable[[Tensor], Tensor]] = {"pixels": self.small, "latents": self.latents}
        persons = [clip for clip in self.clips["train"] if clip.shown["role"]]
        self.prompts = {
            "trained triples": spread(persons, options.clips),
            "held-out triples": spread(self.clips["test"], options.clips),
        }

    def small(self, videos: Tensor) -> Tensor:
        """uint8 [B, F, C, H, W] -> frames at half the size, float32 [B, D]."""
        return F.avg_pool2d(videos.flatten(0, 1).float() / 255, 2).unflatten(0, videos.shape[:2]).flatten(1)

    def latents(self, videos: Tensor) -> Tensor:
        """uint8 [B, F, C, H, W] -> float32 [B, D]."""
        return self.pipe.vae.encode(to_model_range(videos)).latent_dist.mode().flatten(1)

    @cached_property
    def known(self) -> dict[str, Tensor]:
        """Features of all true clips, by their name."""
        return {
            name: torch.cat([of(videos_of(batch)) for _, batch in batches(self.everything, name)])
            for name, of in self.features.items()
        }

    def nearest(self, videos: Tensor, name: str) -> list[Attributes]:
        """What those true clips show whose features are nearest to those of videos, by squared distance."""
        numbers = torch.cdist(self.features[name](videos), self.known[name]).argmin(1)
        return [self.everything[i].shown for i in numbers]

    @cached_property
    def recogniser(self) -> Recogniser:
        return train_recogniser(self.clips["train"], self.options.recogniser_steps)

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
        rows = {f"{of}: nearest clip, {name}": accuracy(self.nearest(videos, name), asked) for name in self.features}
        rows[f"{of}: recogniser"] = accuracy(self.recogniser.describe(videos), asked)
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
            rows[f"recogniser, {kind}"] = accuracy(self.recogniser.describe(videos), asked)
            if self.judge and self.options.judge != self.options.model:  # else its row would be the first one again
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
    parser.add_argument("--recogniser-steps", type=int, default=1500, help="training of the recogniser")
    options = parser.parse_args(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
