"""Give a hundred inputs, sound and broken ones mixed, to every command that reads a user's files.

    python tools/check_inputs.py                                  # all commands
    python tools/check_inputs.py --only caption convert --inputs 30

Of each command it checks: no exception escapes; the exit code is right; every sound input comes out, every broken one
is named and counted; and nothing half-written looks whole.  Ends with exit code 1 unless all is so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from univigu import cli
from univigu.data.index import index_folder
from univigu.data.rows import split_lines
from univigu.data.shards import Manifest
from univigu.data.video import VideoError, read_video
from univigu.models.foundation import EMBEDDED_FOUNDATION

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests import damage

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a small red circle moving left slowly, on a black background"
BROKEN_VIDEOS = (
    "empty-video", "cut-video", "text-video", "noise-video", "zeroed-video", "audio-only", "no-frames", "huge-frames",
)  # fmt: skip
BROKEN_ROWS = (
    "no json", "[1, 2]", "3", '{"text": "x"}', '{"prompt": 5}', '{"prompt": null}', '{"prompt": ["a"]}', "{",
    '{"prompt": "half \\ud83d a character"}', '{"prompt": "cut',
)  # fmt: skip
LONG = json.dumps({"prompt": "red " * 300})
ODD_TEXTS = ("", " ", "ä ö ü", "红色的圆", "a\u2028b\x85c", "\\ \" ' {} %s", "🟥", "\x00\x07")


@dataclass
class Outcome:
    """What became of a command's inputs."""

    inputs: int
    sound: int
    complaints: list[str] = field(default_factory=list)


def call(main: Callable[[list[str]], int | None], args: list[str], expected: int, outcome: Outcome) -> str:
    """Run a command here; complain if an exception escapes or it ends with another code. Gives what it printed."""
    printed = io.StringIO()
    code: Any
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        patch.object(sys, "argv", sys.argv[:1]),  # Lightning warns of two sources of arguments
    ):
        try:
            code = main(args)
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
    if (code or 0) != expected:
        outcome.complaints.append(f"{' '.join(args)}: expected exit code {expected}, got {code}: {printed.getvalue()}")
    return printed.getvalue()


def whole(folder: Path, outcome: Outcome) -> None:
    """Complain of what is left half done: temporary files, videos that cannot be read."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".part", ".tmp") or ".part" in path.suffixes:
            outcome.complaints.append(f"{path}: left behind")
        elif path.suffix == ".mp4":
            try:
                read_video(path, 1, 16, 16)
            except VideoError as error:
                outcome.complaints.append(str(error))


def judge(rows: list[Any], sound: list[bool], outcome: Outcome) -> None:
    """Complain unless there is a row for each input, with an error where it is broken and none where it is sound."""
    if len(rows) != len(sound):
        outcome.complaints.append(f"{len(rows)} rows of {len(sound)} inputs")
    for row, good in zip(rows, sound, strict=False):
        if (row["error"] is None) != good:
            outcome.complaints.append(f"{'refused' if good else 'taken'}: {row}")


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in split_lines(path.read_text(encoding="utf-8"))[:-1]] if path.exists() else []


# --------------------------------------------------------------------- inputs


def videos(folder: Path, count: int, rng: random.Random) -> dict[str, bool]:
    """Files, every second one broken; whether each is sound, in the order of their names."""
    folder.mkdir()
    bases, odd, sound = [damage.good_sample(i) for i in range(4)], list(damage.ODD.values()), {}
    for i in range(count):
        good = i % 2 == 0
        make = odd[i // 2 % len(odd)] if good else damage.DAMAGES[BROKEN_VIDEOS[i // 2 % len(BROKEN_VIDEOS)]]
        path = folder / f"{i:03d} {rng.choice(ODD_TEXTS[2:4])}\u2028.mp4"
        path.write_bytes(make(rng, rng.choice(bases))["mp4"])
        sound[str(path)] = good
    return sound


def prompts(path: Path, count: int, cut: bool = False) -> list[bool]:
    """A .jsonl file, every second row broken; one is too long, sound for a command that cuts it."""
    lines = []
    for i in range(count):
        odd = ODD_TEXTS[i // 2 % len(ODD_TEXTS)]
        sound = json.dumps({"prompt": f"{PROMPT} {i} {odd}", "id": i}, ensure_ascii=False)
        lines.append(BROKEN_ROWS[i // 2 % len(BROKEN_ROWS)] if i % 2 else sound)
    lines[1] = LONG
    path.write_text("\n".join(lines), encoding="utf-8")
    return [i % 2 == 0 or (cut and i == 1) for i in range(count)]


def pairs(folder: Path, count: int, text: str, rng: random.Random) -> list[bool]:
    """A .jsonl file of videos with texts: broken videos, broken rows, and sound ones."""
    files, lines, sound = list(videos(folder / "videos", count, rng).items()), [], []
    good = [path for path, is_good in files if is_good]
    wrong: list[dict[str, Any]] = [
        {text: None}, {text: 3}, {text: "red " * 300}, {text: "half \ud83d"}, {"video": "nowhere.mp4"}, {"video": 7},
        {"colour": "red"}, {"strength": 2}, {"strength": "much"}, {"strength": 0},
    ]  # fmt: skip
    for i, (path, is_good) in enumerate(files):
        row: dict[str, Any] = {"video": path, text: f"{PROMPT} {ODD_TEXTS[i % len(ODD_TEXTS)]}"}
        if is_good and i % 4:  # a sound video, but not a sound row
            row, is_good = {**row, "video": good[0], **wrong[i // 4 % len(wrong)]}, False
        lines.append(json.dumps(row) if i % 11 else "{" if i else json.dumps(row))
        sound.append(is_good and (i == 0 or i % 11 != 0))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return sound


# ------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Parts:
    """What the commands are given besides their inputs."""

    checkpoint: Path
    model: Path
    """A pipeline's folder."""


def predict(task: str, folder: Path, count: int, parts: Parts, rng: random.Random) -> Outcome:
    """``lightning predict`` of a task."""
    if task == "caption":
        sound, given = list(videos(folder / "videos", count, rng).values()), f"--data.videos={folder}/videos"
    elif task in ("generate", "joint"):
        sound, given = prompts(folder / "prompts.jsonl", count), f"--data.prompts={folder}/prompts.jsonl"
    else:
        sound = pairs(folder, count, "prompt" if task == "edit" else "question", rng)
        given = f"--data.pairs={folder}/pairs.jsonl"
    outcome, output = Outcome(count, sum(sound)), folder / "out"
    args = [
        "predict", f"--config={ROOT}/configs/{task}.yaml", f"--ckpt_path={parts.checkpoint}", "--data.batch_size=8",
        "--data.num_workers=0", f"--trainer.default_root_dir={output}", "--model.sampling.num_inference_steps=2",
        "--model.sampling.caption_steps=2", "--trainer.enable_progress_bar=false", "--trainer.callbacks="
        "univigu.training.callbacks.PredictionWriter", given,
    ]  # fmt: skip
    call(cli.main, args, 0, outcome)
    judge(rows_of(next(output.glob("*.jsonl"), output / "none")), sound, outcome)
    whole(output, outcome)
    return outcome


def convert(folder: Path, count: int, parts: Parts, rng: random.Random) -> Outcome:
    """``tools/convert.py``: a command an input; what is refused leaves nothing."""
    main, whole_file = tool("convert"), parts.checkpoint.read_bytes()
    (folder / "file").write_text("not a folder")
    (folder / "empty").mkdir()
    broken = {
        "empty.ckpt": b"", "text.ckpt": b"no weights", "cut.ckpt": whole_file[: len(whole_file) // 2],
        "noise.safetensors": rng.randbytes(5000), "zeros.pth": bytes(5000), "cut.pth": whole_file[:500],
    }  # fmt: skip
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    for name, state in {"list.ckpt": [1, 2], "other.ckpt": {"state_dict": {"a": torch.zeros(2)}}}.items():
        torch.save(state, folder / name)
    sources = [folder / name for name in (*broken, "list.ckpt", "other.ckpt", "nowhere.ckpt", "empty", "file")]
    kinds: list[list[str]] = [["transformer"], ["pipeline"], ["wan"], ["export-official"], ["foundation"]]
    kinds.append(["import-official", "--wan", EMBEDDED_FOUNDATION])
    outcome = Outcome(count, 0)
    for i in range(count):
        kind, output = kinds[i // 3 % len(kinds)], folder / f"out{i}"
        good = i % 3 == 0 and kind[0] in ("transformer", "pipeline")
        source = parts.checkpoint if good else sources[i % len(sources)]
        printed = call(main, [*kind, f"--checkpoint={source}", f"--output={output}"], 0 if good else 2, outcome)
        if output.exists() != good:
            outcome.complaints.append(f"{kind[0]} {source}: {output} {'is missing' if good else 'was made'}")
        if not good and (not printed.startswith("error: ") or source.name not in printed):
            outcome.complaints.append(f"{kind[0]} {source}: the file is not named: {printed}")
        outcome.sound += good
    whole(folder, outcome)
    return outcome


def synthesize(folder: Path, count: int, parts: Parts, rng: random.Random) -> Outcome:
    sound = prompts(folder / "prompts.jsonl", count)
    outcome, output = Outcome(count, sum(sound)), folder / "out"
    args = ["--steps=1", "--guidance-scale=1", "--batch-size=8", "--min-caption=0", "--max-caption=9999"]
    call(tool("synthesize"), [f"--prompts={folder}/prompts.jsonl", f"--output={output}", *args], 0, outcome)
    check_shards(output, {f"{i:08d}" for i, good in enumerate(sound) if good}, count, outcome)
    return outcome


def encode(folder: Path, count: int, parts: Parts, rng: random.Random) -> Outcome:
    damaged = max(count // 2, len(damage.SHARD_DAMAGES))
    sound = damage.write_damaged(folder / "shards", damaged, count - damaged, seed=rng.randrange(1000))
    outcome, output = Outcome(count, len(sound)), folder / "out"
    call(tool("encode"), [f"--source={folder}/shards", f"--output={output}", "--workers=1"], 0, outcome)
    check_shards(output, sound, count, outcome)
    return outcome


def check_shards(folder: Path, sound: set[str], count: int, outcome: Outcome) -> None:
    """Complain unless a folder of shards is whole, holds these samples, and counts all the others."""
    manifest = Manifest.load(folder)
    if manifest is None or not manifest.complete or manifest.check_files(folder, checksums=True):
        outcome.complaints.append(f"{folder}: not whole")
        return
    refs, errors = index_folder(folder)
    if errors or {ref.key for ref in refs} != sound:
        outcome.complaints.append(f"{folder}: lost {sound - {ref.key for ref in refs}}, {errors}")
    if manifest.counts.get("kept", 0) != len(sound) or sum(manifest.counts.values()) != count:
        outcome.complaints.append(f"{folder}: counted {manifest.counts}, not {len(sound)} of {count}")
    whole(folder, outcome)


def vbench(folder: Path, count: int, parts: Parts, rng: random.Random) -> Outcome:
    sound = prompts(folder / "prompts.jsonl", count, cut=True)
    return evaluate(
        "vbench", folder, [f"--prompts={folder}/prompts.jsonl", "--videos-per-prompt=1", "--steps=1"], sound, parts
    )


def vdc(folder: Path, count: int, parts: Parts, rng: random.Random) -> Outcome:
    sound = list(videos(folder / "videos", count, rng).values())
    return evaluate("vdc", folder, [f"--videos={folder}/videos", "--caption-steps=1"], sound, parts)


def evaluate(name: str, folder: Path, args: list[str], sound: list[bool], parts: Parts) -> Outcome:
    """``tools/evaluate.py``."""
    outcome, output = Outcome(len(sound), sum(sound)), folder / "out"
    args = [name, *args, f"--model={parts.model}", f"--output={output}", "--batch-size=8"]
    call(tool("evaluate"), args, 0, outcome)
    judge(rows_of(output / ("videos.jsonl" if name == "vbench" else "captions.jsonl")), sound, outcome)
    whole(output, outcome)
    return outcome


COMMANDS: dict[str, Callable[[Path, int, Parts, random.Random], Outcome]] = {
    **{task: partial(predict, task) for task in ("caption", "generate", "joint", "edit", "qa")},
    "convert": convert, "synthesize": synthesize, "encode": encode, "vbench": vbench, "vdc": vdc,
}  # fmt: skip


def tool(name: str) -> Callable[[list[str]], int]:
    """A command's ``main``."""
    main: Callable[[list[str]], int] = runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]
    return main


def make_parts(folder: Path) -> Parts:
    """A model one step old, as a checkpoint and as a pipeline.

    Raises:
        RuntimeError: it could not be made.
    """
    setup = Outcome(0, 0)
    args = [
        "fit",
        f"--config={ROOT}/configs/recall.yaml",
        f"--config={ROOT}/configs/frozen.yaml",
        f"--trainer.default_root_dir={folder}",
        "--trainer.max_steps=1",
        "--trainer.logger=false",
        f"--data.root={folder}/data",
        "--data.num_train_clips=4",
        "--data.num_val_clips=2",
        "--data.batch_size=2",
        f"--checkpoint.dirpath={folder}",
        "--report.num_samples=1",
    ]
    call(cli.main, args, 0, setup)
    parts = Parts(folder / "last.ckpt", folder / "model")
    if not setup.complaints:
        call(tool("convert"), ["pipeline", f"--checkpoint={parts.checkpoint}", f"--output={parts.model}"], 0, setup)
    if setup.complaints:
        raise RuntimeError("\n".join(setup.complaints))
    return parts


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep what libraries in C write to standard error, a line for every broken video, off the screen."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--inputs", type=int, default=100, help="of each command, at least 2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    table = Table("command", "inputs", "sound", "complaints", title="sound and broken inputs")
    complaints: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts = make_parts(folder)
        for name in options.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            (folder / name).mkdir()
            with quietly():
                outcome = COMMANDS[name](folder / name, options.inputs, parts, random.Random(options.seed))
            table.add_row(name, str(outcome.inputs), str(outcome.sound), str(len(outcome.complaints)))
            complaints += [f"{name}: {text}" for text in outcome.complaints]
    Console(width=100).print(table)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    print("NOT as it should be" if complaints else "all as it should be")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
