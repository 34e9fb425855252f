"""Turn Microsoft's Fluent animated emoji, as packed for npm, into a data set in the documented format.

    npm pack @lobehub/fluent-emoji-anim-1 @lobehub/fluent-emoji-anim-2 @lobehub/fluent-emoji-anim-3 \
        @lobehub/fluent-emoji-anim-4 unicode-emoji-json emojilib
    python tools/prepare_fluent.py *.tgz --output data/fluent

Each animation stands on several plain backgrounds.  Its transparency is composited on sRGB values, as browsers do.  The
splits: ``test`` has a fifth of the (role, gender, skin tone) triples, whose pairs are all in ``train``; ``val`` has the
animations of ``train`` on a background of which ``train`` has no clip of them.  All packages are under the MIT licence.
"""

import argparse
import json
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import combinations, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence

from univigu.cli import ToolParser
from univigu.data.engine import SpawnPool
from univigu.data.shards import Manifest, ShardInfo, build_folder, write_shard
from univigu.data.video import encode_mp4, even_indices
from univigu.shapes.scenes import CANVAS
from univigu.shapes.texts import region_of

TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
YELLOW = "yellow"  # the tone of a person without one
GENDERS = {"1f468": "man", "1f469": "woman", "1f9d1": "person", "2642": "man", "2640": "woman"}
JOINER, VARIANT = "200d", "fe0f"
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "blue": (120, 170, 230),
    "green": (140, 200, 140),
    "pink": (240, 180, 200),
}
COLORS = BACKGROUNDS | {
    "red": (220, 40, 50),
    "orange": (250, 140, 40),
    "yellow": (250, 210, 60),
    "brown": (120, 75, 45),
    "purple": (130, 80, 200),
    "dark blue": (40, 70, 150),
    "dark green": (40, 120, 60),
    "beige": (235, 200, 165),
}


@dataclass(frozen=True)
class Emoji:
    """What the code points of an animation's file name say."""

    file: Path
    name: str
    group: str
    keywords: tuple[str, ...] = ()
    role: str = ""
    """Of a person that comes in several genders; empty for everything else."""
    gender: str = ""
    tone: str = ""
    """Of a single person; empty for everything else."""

    @property
    def subject(self) -> str:
        return f"{self.name} with {self.tone} skin" if self.tone else self.name


def key_of(codes: Iterable[str]) -> str:
    return "-".join(code for code in codes if code != VARIANT)


def read_names(folder: Path, file: str) -> dict[str, Any]:
    """A JSON object by emoji, which one of the packages has, by code points instead."""
    for path in folder.rglob(file):
        found = json.loads(path.read_text())
        return {key_of(f"{ord(letter):04x}" for letter in emoji): value for emoji, value in found.items()}
    raise ValueError(f"PACKAGE: none of them has the file {file}")


def describe(file: Path, names: dict[str, Any], keywords: dict[str, list[str]]) -> Emoji | None:
    """The emoji of a file named by its code points; None if it is no known emoji, or of several skin tones."""
    codes = [code for code in file.stem.split("-") if code != VARIANT]
    tones = [TONES[code] for code in codes if code in TONES]
    base = [code for code in codes if code not in TONES]
    entry = names.get("-".join(base))
    if entry is None or len(tones) > 1:
        return None
    words = tuple(word.replace("_", " ") for word in keywords.get("-".join(base), [])[1:9])
    name, group = entry["name"].replace(":", ""), entry["group"].lower().replace("&", "and")
    people = [code for code in base if code in GENDERS]
    signed = "-".join([*base, JOINER, "2642"]) in names  # a person whose gender a sign would tell
    if not entry["skin_tone_support"] or len(people) > 1 or not (people or signed):
        tone = (tones or [YELLOW])[0] if entry["skin_tone_support"] and len(people) < 2 else ""
        return Emoji(file, name, group, words, tone=tone)
    gender = GENDERS[people[0]] if people else "person"
    neutral = ["1f9d1" if code in GENDERS else code for code in base if code not in ("2640", "2642")]
    neutral_name = names.get("-".join(neutral).removesuffix(f"-{JOINER}"), entry)["name"]
    role = re.sub(r"\b(person|people|man|woman|men|women)\b", "", neutral_name).strip(" :") or "adult"
    return Emoji(file, name, group, words, re.sub(r"\s+", " ", role), gender, (tones or [YELLOW])[0])


def held_out(emoji: list[Emoji]) -> set[tuple[str, str, str]]:
    """About a fifth of the (role, gender, tone) triples, such that the others have every pair of their values."""
    triples = sorted({(e.role, e.gender, e.tone) for e in emoji if e.role})
    genders, tones = list(dict.fromkeys(GENDERS.values())), [YELLOW, *TONES.values()]

    def chosen(triple: tuple[str, str, str]) -> bool:
        return (zlib.crc32(triple[0].encode()) + 2 * genders.index(triple[1]) + tones.index(triple[2])) % 5 == 0

    def pairs(triple: tuple[str, str, str]) -> set[Any]:
        return set(combinations(enumerate(triple), 2))  # of values with their places

    seen = {pair for triple in triples if not chosen(triple) for pair in pairs(triple)}
    return {triple for triple in triples if chosen(triple) and pairs(triple) <= seen}


# ---------------------------------------------------------------- pictures


@lru_cache(maxsize=1)
def read_animation(file: Path, size: int) -> tuple[np.ndarray, int]:
    """All frames, RGBA float32 [F, size, size, 4] in [0, 1] with premultiplied alpha, and frames a second."""
    with Image.open(file) as image:
        frames, durations = [], []
        for frame in ImageSequence.Iterator(image):
            durations.append(frame.info.get("duration", 40))
            frames.append(np.asarray(frame.convert("RGBA").convert("RGBa").resize((size, size), Image.Resampling.BOX)))
    return np.stack(frames).astype(np.float32) / 255, max(1, round(1000 * len(durations) / sum(durations)))


def place(y: float, x: float) -> str:
    """The ninth of the frame with a point in [0, 1]."""
    return region_of((x * CANVAS, y * CANVAS))


def main_colors(frame: np.ndarray) -> list[str]:
    """Names of the three most frequent colours where a premultiplied frame [H, W, 4] is opaque."""
    opaque = frame[frame[..., 3] > 0.9][:, :3] * 255
    names, table = list(COLORS), np.array(list(COLORS.values()), np.float32)
    nearest = np.square(opaque[:, None] - table).sum(-1).argmin(1)
    counts = np.bincount(nearest, minlength=len(names))
    return [names[i] for i in np.argsort(-counts, kind="stable")[:3] if counts[i]] or ["no"]


def motion_of(frames: np.ndarray) -> dict[str, str]:
    """Amount, place, time and repetition of an animation's motion, in words."""
    light = frames[..., :3].mean(-1)
    change = np.abs(np.diff(light, axis=0))
    share = float((np.ptp(light, axis=0) > 0.08).mean())
    steps = [0.01, 0.06, 0.15, 0.3]
    amount = ("nothing", "very little", "a small part", "a large part", "nearly everything")
    spread = light.std(0)
    weight = spread / max(float(spread.sum()), 1e-6)
    grid = (np.arange(len(weight)) + 0.5) / len(weight)
    thirds = [part.mean() for part in np.array_split(change.mean((1, 2)), 3)]
    away = np.abs(light - light[0]).mean((1, 2))
    near = away < 0.35 * max(float(away.max()), 1e-6)  # the moments that look like the start
    cycles = max(1, sum(now and not before for before, now in pairwise(near.tolist())))
    return {
        "amount": amount[int(np.searchsorted(steps, share))],
        "place": place(float((weight.sum(1) * grid).sum()), float((weight.sum(0) * grid).sum())),
        "third": ("first", "second", "last")[int(np.argmax(thirds))],
        "cycles": ("one time", "two times", "three times", "four times", "many times")[min(cycles, 5) - 1],
    }


def texts_of(emoji: Emoji, frames: np.ndarray, background: str) -> dict[str, Any]:
    """The json member of a clip."""
    motion, shown = motion_of(frames), frames[..., 3].max(0) > 0.5
    rows, columns = (np.flatnonzero(shown.any(axis)) / len(shown) for axis in (1, 0))
    if not len(rows):
        rows = columns = np.zeros(1)
    colors, size = main_colors(frames[0]), float(shown.mean())
    extent = "a small part" if size < 0.25 else "about half" if size < 0.55 else "most"
    article = "an" if emoji.subject[0] in "aeiou" else "a"
    sentences = [
        f"the animation shows {article} {emoji.subject} in front of a plain {background} background.",
        f"it belongs to the group of {emoji.group}.",
        f"words that describe it are {', '.join(emoji.keywords) or emoji.name}.",
    ]
    if emoji.role:
        sentences.append(f"its role is {emoji.role}, the person shown is a {emoji.gender}.")
    if emoji.tone:
        sentences.append(f"the tone of the skin is {emoji.tone}, and it is the same in every frame.")
    sentences += [
        f"the figure fills {extent} of the frame, from the {place(rows[0], columns[0])} part to the "
        f"{place(rows[-1], columns[-1])} part.",
        f"when the clip begins, the most frequent color of the figure is {colors[0]}"
        + (f", followed by {' and '.join(colors[1:])}." if colors[1:] else "."),
        f"in this clip {motion['amount']} of the frame moves, and the center of the motion is in the "
        f"{motion['place']} part of the frame.",
        f"the motion is strongest in the {motion['third']} third of the clip, and the figure returns to where it "
        f"started {motion['cycles']}.",
        f"the {background} background is plain and keeps the same shade in every frame. the camera does not move, "
        "nothing else appears, there is no text in the picture, and the animation can be repeated without a visible "
        "cut.",
    ]
    questions = [("background", "what color is the background?", background), ("name", "what is it?", emoji.name)]
    questions += [("motion", "how much of the frame moves?", motion["amount"])]
    questions += [("tone", "which tone has the skin?", emoji.tone)] if emoji.tone else []
    questions += [("gender", "is it a man, a woman or a person?", emoji.gender)] if emoji.role else []
    return {
        "prompt": f"{emoji.subject}, on a {background} background",
        "caption": " ".join(sentences),
        "qa": [{"kind": kind, "question": text, "answer": f"{answer}."} for kind, text, answer in questions],
        "emoji": {**asdict(emoji), "file": emoji.file.name, "background": background},
    }


# ------------------------------------------------------------------ shards


def write(path: Path, clips: list[tuple[Emoji, str]], size: int, num_frames: int) -> ShardInfo:
    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for emoji, background in clips:
            frames, fps = read_animation(emoji.file, size)
            chosen = frames[even_indices(len(frames), num_frames)]
            canvas = np.array(BACKGROUNDS[background], np.float32) / 255
            shown = chosen[..., :3] + (1 - chosen[..., 3:]) * canvas
            pixels = torch.from_numpy(np.rint(shown * 255).clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2)
            video = encode_mp4(pixels, fps=max(1, round(fps * num_frames / len(frames))))
            texts = json.dumps(texts_of(emoji, frames, background)).encode()
            yield f"{emoji.file.stem}-{background}", {"mp4": video, "json": texts}

    return write_shard(path, samples())


def plan(emoji: list[Emoji], per_emoji: int) -> dict[str, list[tuple[Emoji, str]]]:
    """The clips of each split."""
    splits: dict[str, list[tuple[Emoji, str]]] = {"train": [], "val": [], "test": []}
    unseen = held_out(emoji)
    for e in emoji:
        start = zlib.crc32(e.file.name.encode())
        names = [list(BACKGROUNDS)[(start + i) % len(BACKGROUNDS)] for i in range(per_emoji)]
        if (e.role, e.gender, e.tone) in unseen:
            splits["test"] += [(e, name) for name in names[:2]]
        else:
            splits["train"] += [(e, name) for name in names[1:]]
            splits["val"].append((e, names[0]))
    return splits


def is_animated(file: Path) -> bool:
    with Image.open(file) as image:
        return getattr(image, "n_frames", 1) > 1


def run(options: argparse.Namespace) -> None:
    if not 2 <= options.backgrounds <= len(BACKGROUNDS):
        raise ValueError(f"--backgrounds {options.backgrounds}: expected 2 to {len(BACKGROUNDS)}")
    with TemporaryDirectory() as folder, SpawnPool() as pool:
        for package in options.packages:
            shutil.unpack_archive(package, Path(folder, package.stem), filter="data")
        names, keywords = (read_names(Path(folder), file) for file in ("data-by-emoji.json", "emoji-en-US.json"))
        files = sorted(Path(folder).rglob("*.webp"), key=lambda file: file.name)
        found = [describe(file, names, keywords) for file in files if is_animated(file)]
        emoji = [e for e in found if e is not None]
        print(f"{len(files)} files, {len(found)} animations, {len(found) - len(emoji)} skipped (several skin tones)")
        for split, clips in plan(emoji, options.backgrounds).items():
            parts = [clips[start : start + 100] for start in range(0, len(clips), 100)]
            jobs = {f"{split}-{number:06d}.tar": part for number, part in enumerate(parts)}
            sources = [(e.file.name, background) for e, background in clips]
            size = {"size": options.size, "num_frames": options.num_frames}
            clips_hash = zlib.crc32(repr(sources).encode())
            manifest = Manifest("video", {"generator": "fluent", "clips": clips_hash, **size})
            print(build_folder(options.output / split, manifest, jobs, partial(write, **size), pool.map).state)


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE", help=".tgz file of npm pack")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, with train, val and test")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels, even")
    parser.add_argument("--num-frames", type=int, default=25, help="frames a clip, spread evenly over the animation")
    parser.add_argument("--backgrounds", type=int, default=4, help="backgrounds of each animation, one only in val")
    return parser.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
