"""Evaluate a model of the animated emoji (tools/prepare_fluent.py) without rules that check pixels.

    python tools/convert.py pipeline --checkpoint runs/fluent/refine/checkpoints/last.ckpt \
        --foundation runs/fluent/final --output runs/fluent/model
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univigu.cli import ToolParser, exit_code
from univigu.data.index import find_split, index_folder
from univigu.data.progress import track
from univigu.data.sample import TEXT_SUFFIX
from univigu.data.video import even_indices, to_uint8
from univigu.evaluation.video_metrics import FrechetVideoDistance, VideoFeatures
from univigu.pipeline import UniViGUPipeline
from univigu.training.loop import optimize

ATTRIBUTES = ("name", "role", "gender", "tone", "background")
SUBJECT = re.compile(
    r"^(?:the animation shows an? )?(?P<name>.+?)(?: with (?P<tone>[\w-]+) skin)?"
    r"(?: in front of a plain|, on a) (?P<background>\w+) background"
)
BATCH = 16
Attributes = dict[str, str]


@dataclass(frozen=True)
class Clip:
    """A true clip: uint8 [F, C, H, W], its texts, and what it shows; "" for an attribute that it does not have."""

    video: Tensor
    texts: dict[str, Any]
    shown: Attributes


def read_clips(folder: Path, split: str, size: tuple[int, int, int]) -> list[Clip]:
    """All clips of a split, ``size`` is (F, H, W)."""
    clips = []
    for ref in track(index_folder(find_split(folder, split))[0], f"reading {split}"):
        texts = json.loads(ref.read(TEXT_SUFFIX))
        shown = {name: str(texts["emoji"][name]).lower() for name in ATTRIBUTES}
        clips.append(Clip(ref.video(*size).contiguous(), texts, shown))
    return clips


def spread(clips: Sequence[Clip], count: int) -> list[Clip]:
    """Up to ``count`` clips, spread evenly."""
    return [clips[i] for i in even_indices(len(clips), min(count, len(clips)))]


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


class Nearest:
    """Finds the true clip nearest to a video, by squared distance of features."""

    def __init__(self, clips: Sequence[Clip], features: Callable[[Tensor], Tensor], name: str) -> None:
        self.clips, self.features = clips, features
        videos = [clip.video for clip in clips]
        parts = [self.features(torch.stack(videos[i : i + BATCH])) for i in track(range(0, len(videos), BATCH), name)]
        self.known = torch.cat(parts)

    def __call__(self, videos: Tensor) -> list[Attributes]:
        """uint8 [B, F, C, H, W] -> what the nearest clips show."""
        return [self.clips[i].shown for i in torch.cdist(self.features(videos), self.known).argmin(1)]


def small(videos: Tensor) -> Tensor:
    """uint8 [B, F, C, H, W] -> frames at half the size, float32 [B, D]."""
    return F.avg_pool2d(videos.flatten(0, 1).float() / 255, 2).unflatten(0, videos.shape[:2]).flatten(1)


def distances(videos: Tensor, true: Tensor, network: str) -> dict[str, float]:
    """Frechet distance of videos from true ones, and of one half of the true ones from the other."""
    metric, result = FrechetVideoDistance(VideoFeatures(network)), {}
    for name, made, real in (("fvd", videos, true), ("fvd of true halves", true[::2], true[1::2])):
        metric.reset()
        for part in made.split(BATCH):
            metric.update(part, real=False)
        for part in real.split(BATCH):
            metric.update(part, real=True)
        result[name] = round(float(metric.compute()), 2)
    return result


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
    shown, videos = [clip.shown for clip in clips], torch.stack([clip.video for clip in clips])
    values = {name: sorted({row[name] for row in shown if row[name]}) for name in ATTRIBUTES}
    numbers = {name: {value: i for i, value in enumerate(known)} for name, known in values.items()}
    labels = {name: torch.tensor([numbers[name].get(row[name], -100) for row in shown]) for name in ATTRIBUTES}
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


class Evaluation:
    """The tasks by name; each returns rows of accuracies."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.size = {name: getattr(options, name) for name in ("num_frames", "height", "width")}
        self.guided = {"guidance_scale": options.guidance, "num_inference_steps": options.steps, "output_type": "pt"}
        self.pipe = UniViGUPipeline.from_pretrained(options.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.clips = {
            split: read_clips(options.data, split, tuple(self.size.values())) for split in ("train", "val", "test")
        }
        self.everything = [clip for clips in self.clips.values() for clip in clips]
        self.people = {
            clip.shown["name"]: {name: clip.shown[name] for name in ("role", "gender")} for clip in self.everything
        }
        persons = [clip for clip in self.clips["train"] if clip.shown["role"]]
        self.prompts = {
            "trained triples": spread(persons, options.clips),
            "held-out triples": spread(self.clips["test"], options.clips),
        }

    @cached_property
    def nearest(self) -> dict[str, Nearest]:
        def latents(videos: Tensor) -> Tensor:
            pixels = videos.transpose(1, 2).float() / 127.5 - 1
            return self.pipe.vae.encode(pixels).latent_dist.mode().flatten(1)

        return {
            "nearest clip, pixels": Nearest(self.everything, small, "pixels"),
            "nearest clip, latents": Nearest(self.everything, latents, "encoding"),
        }

    @cached_property
    def recogniser(self) -> Recogniser:
        return train_recogniser(self.clips["train"], self.options.recogniser_steps)

    @cached_property
    def judge(self) -> UniViGUPipeline:
        if self.options.judge == self.options.model:
            return self.pipe
        pipe = UniViGUPipeline.from_pretrained(self.options.judge)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def describe(self, pipe: UniViGUPipeline, videos: Tensor) -> list[Attributes]:
        """What a model's captions of uint8 videos [B, F, C, H, W] say."""
        found = []
        for number in track(range(0, len(videos), BATCH), "captions"):
            output = pipe.caption(videos[number : number + BATCH], **self.start(number))
            found += [read_text(text, self.people) for text in output.text or []]
        return found

    def start(self, seed: int) -> dict[str, Any]:
        """Options that all tasks have."""
        return {"generator": torch.Generator().manual_seed(seed), "max_sequence_length": self.options.prompt_length}

    def judged(self, videos: Tensor, asked: list[Attributes], of: str) -> dict[str, dict[str, float]]:
        """Accuracies of generated videos by every judge."""
        rows = {f"{of}: {name}": accuracy(nearest(videos), asked) for name, nearest in self.nearest.items()}
        rows[f"{of}: recogniser"] = accuracy(self.recogniser.describe(videos), asked)
        if self.options.judge:
            rows[f"{of}: captions of the judge"] = accuracy(self.describe(self.judge, videos), asked)
        return rows | {f"{of}: chance": chance(asked, self.everything)}

    # ----------------------------------------------------------------- tasks

    def caption(self) -> dict[str, dict[str, float]]:
        rows = {}
        for split, kind in (("val", "other backgrounds"), ("test", "held-out triples")):
            chosen = spread(self.clips[split], self.options.clips)
            videos, asked = torch.stack([clip.video for clip in chosen]), [clip.shown for clip in chosen]
            rows[f"captions, {kind}"] = accuracy(self.describe(self.pipe, videos), asked)
            rows[f"recogniser, {kind}"] = accuracy(self.recogniser.describe(videos), asked)
            if self.options.judge not in (None, self.options.model):  # else its row would be the first one again
                rows[f"captions of the judge, {kind}"] = accuracy(self.describe(self.judge, videos), asked)
            rows[f"captions, {kind}: chance"] = chance(asked, self.everything)
        return rows

    def generate(self) -> dict[str, dict[str, float]]:
        rows = {}
        for kind, chosen in self.prompts.items():
            videos = []
            for number in track(range(0, len(chosen), BATCH), f"videos, {kind}"):
                prompts = [clip.texts["prompt"] for clip in chosen[number : number + BATCH]]
                videos.append(to_uint8(self.pipe(prompts, **self.size, **self.guided, **self.start(number)).frames))
            made = torch.cat(videos)
            torch.save(made, self.options.output / f"generated, {kind}.pt")
            rows |= self.judged(made, [clip.shown for clip in chosen], f"videos, {kind}")
            if self.options.video_features:
                rows[f"videos, {kind}: FVD"] = distances(
                    made, torch.stack([clip.video for clip in chosen]), self.options.video_features
                )
        return rows

    def joint(self) -> dict[str, dict[str, float]]:
        rows = {}
        for kind, chosen in self.prompts.items():
            videos, said = list[Tensor](), list[Attributes]()
            for number in track(range(0, len(chosen), BATCH), f"both, {kind}"):
                prompts = [clip.texts["prompt"] for clip in chosen[number : number + BATCH]]
                output = self.pipe.joint(prompts, **self.size, **self.guided, **self.start(number))
                videos.append(to_uint8(output.frames))
                said += [read_text(text, self.people) for text in output.text or []]
            asked = [clip.shown for clip in chosen]
            rows[f"joint, {kind}: text and prompt"] = accuracy(said, asked)
            rows |= self.judged(torch.cat(videos), said, f"joint, {kind}, video and text")
        return rows

    def edit(self) -> dict[str, dict[str, float]]:
        """Another background or skin tone for clips of val."""
        rows = {}
        people = [clip for clip in self.clips["val"] if clip.shown["role"]]
        for name, noun in (("background", "background"), ("tone", "skin")):
            values = sorted({clip.shown[name] for clip in people})
            chosen, asked, videos = spread(people, self.options.clips), list[Attributes](), list[Tensor]()
            for number in track(range(0, len(chosen), BATCH), f"edits of the {name}"):
                batch, prompts = chosen[number : number + BATCH], []
                for clip in batch:
                    old = clip.shown[name]
                    new = values[(values.index(old) + 1) % len(values)]
                    prompts.append(clip.texts["prompt"].replace(f"{old} {noun}", f"{new} {noun}"))
                    asked.append({**clip.shown, name: new})
                clips, options = torch.stack([clip.video for clip in batch]), self.guided | self.start(number)
                videos.append(to_uint8(self.pipe.edit(clips, prompts, self.options.strength, **options).frames))
            rows |= self.judged(torch.cat(videos), asked, f"edits of the {name}")
        return rows

    def answer(self) -> dict[str, dict[str, float]]:
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
    if options.video_features and options.clips < 4:
        raise ValueError(f"--clips {options.clips}: expected at least 4 with --video-features")
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
    parser.add_argument("--video-features", help="network for FVD: a folder of transformers, or trusted:FILE.pt")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--clips", type=int, default=200, help="clips or prompts of each row")
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num-frames", type=int, default=9)
    parser.add_argument("--prompt-length", type=int, default=128, help="slot of the prompt in tokens, as in training")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps of videos")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--recogniser-steps", type=int, default=1500, help="training of the recogniser")
    parser.add_argument("--strength", type=float, default=0.8, help="of edits")
    options = parser.parse_args(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
