"""Kill jobs with SIGKILL at random points, let them go on, and compare with one that nobody disturbed.

    python tools/check_resume.py                            # fit, synthesize and encode, 20 points each
    python tools/check_resume.py fit --points 5 --keep runs/killed

fit         losses and samples of every step, and the final weights, bit for bit (on the CPU)
synthesize  every file of the folder, byte for byte
encode      likewise

Ends with exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TOOLS = Path(__file__).resolve().parent
CLIPS = 8


@dataclass(frozen=True)
class Job:
    """Something that can be cut off and taken up again by the same command."""

    command: Callable[[Path], list[str]]
    """Given the folder it works in."""
    prepare: Callable[[Path], None]
    """Makes what it needs; given the folder that all runs have in common."""
    outcome: Callable[[Path], dict[str, str]]
    """What must not differ, by name."""


# ------------------------------------------------------------------- the jobs


def files(folder: Path) -> dict[str, str]:
    """Checksums of all files, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_prompts(common: Path) -> None:
    from univigu.shapes import scenes, texts

    prompts = [texts.prompt_of(scenes.sample_scene(seed)) for seed in range(CLIPS)]
    (common / "prompts.txt").write_text("\n".join([*prompts, "red " * 200]))  # the last one is left out


def write_videos(common: Path) -> None:
    from univigu.shapes.write import write_shapes

    write_shapes(common / "videos", "train", 3 * CLIPS, shard_size=2)


def prepare_fit(common: Path) -> None:
    _data(common).prepare_data()


def _data(common: Path) -> Any:
    from univigu.data.datamodule import VideoTextDataModule

    sizes = {"num_train_clips": 13, "num_val_clips": 1}
    return VideoTextDataModule(root=str(common / "world"), batch_size=2, num_workers=1, prompt_length=32, **sizes)


def fit(folder: Path, steps: int = 24, every: int = 5) -> None:
    """Train for some steps, a checkpoint every few of them, and note what each step saw and lost."""
    folder.mkdir(exist_ok=True)
    from lightning import Callback, Trainer

    from univigu.training.callbacks import LastCheckpoint, StageSwitch
    from univigu.training.module import UniViGU
    from univigu.training.stages import Stage

    class Notes(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            row = {"step": trainer.global_step, "loss": float(outputs["loss"]).hex(), "keys": batch["key"]}
            with (folder / "steps.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    stage = Stage(steps=steps, target="prompt", text_length=32, warmup_steps=2)
    last = folder / "checkpoints" / "last.ckpt"
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, limit_val_batches=0, enable_model_summary=False,
        enable_progress_bar=False, default_root_dir=str(folder),
        callbacks=[StageSwitch({"recall": stage}), LastCheckpoint(every_n_train_steps=every), Notes()],
    )  # fmt: skip
    trainer.fit(UniViGU(), datamodule=_data(folder.parent), ckpt_path=str(last) if last.exists() else None)


def fit_outcome(folder: Path) -> dict[str, str]:
    """By step, what it saw and lost (also where it was taken twice), and the final weights."""
    import torch

    rows: dict[str, str] = {}
    for line in (folder / "steps.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # it was killed while it wrote
        name, value = f"step {row['step']}", f"{row['loss']} {row['keys']}"
        rows[name] = value if rows.get(name, value) == value else f"{rows[name]}, then {value}"
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    for name, tensor in weights.items():
        rows[name] = hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return rows


def tool(name: str, *args: str) -> Callable[[Path], list[str]]:
    def command(folder: Path) -> list[str]:
        words = [arg.format(common=folder.parent, folder=folder) for arg in args]
        return [sys.executable, str(TOOLS / name), *words]

    return command


JOBS = {
    "fit": Job(tool("check_resume.py", "_fit", "--keep", "{folder}"), prepare_fit, fit_outcome),
    "synthesize": Job(
        tool("synthesize.py", "--prompts", "{common}/prompts.txt", "--output", "{folder}", "--steps", "2",
             "--guidance-scale", "1", "--shard-size", "1", "--device", "cpu"),
        write_prompts, files,
    ),
    "encode": Job(
        tool("encode.py", "--source", "{common}/videos", "--output", "{folder}", "--workers", "1", "--device", "cpu"),
        write_videos, files,
    ),
}  # fmt: skip


# ------------------------------------------------------------------- the check


def run(command: list[str], log: Path, kill_after: float | None = None) -> tuple[bool, float]:
    """Run a command, or kill it and all its children after so many seconds.

    Returns:
        whether it came to its end, and the seconds that took.

    Raises:
        RuntimeError: it failed by itself.
    """
    start = time.perf_counter()
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False, time.perf_counter() - start
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{log.read_text(errors='replace')[-2000:]}")
    return True, time.perf_counter() - start


def first_output(folder: Path, started: float) -> float | None:
    """Seconds from the start to the first file in the folder."""
    times = [path.stat().st_ctime for path in folder.rglob("*") if path.is_file()]
    return min(times) - started if times else None


def check(name: str, common: Path, points: int, rng: random.Random, console: Console) -> bool:
    """Run a job once undisturbed, then kill it at so many points; whether all came to the same."""
    job, log = JOBS[name], common / "log.txt"
    job.prepare(common)
    started = time.time()
    _, seconds = run(job.command(common / "undisturbed"), log)
    expected = job.outcome(common / "undisturbed")
    # Before its first file a process only loads libraries: few of the points are spent on that.
    begun = max(0.0, (first_output(common / "undisturbed", started) or 0.0) - 1)
    table = Table("point", "killed after", "files then", "outcome", title=f"{name}: undisturbed in {seconds:.1f} s")
    same = 0
    for point in range(points):
        folder = common / f"killed-{point:02d}"
        ended, lasted = run(job.command(folder), log, kill_after=rng.uniform(begun, seconds))
        there = sum(path.is_file() for path in folder.rglob("*"))
        run(job.command(folder), log)
        outcome = job.outcome(folder)
        differing = sorted(key for key in expected.keys() | outcome.keys() if expected.get(key) != outcome.get(key))
        same += not differing
        words = f"differs in {', '.join(differing[:3])}" if differing else "the same"
        table.add_row(str(point), f"{lasted:.2f} s" + (" (it had ended)" if ended else ""), str(there), words)
        if not differing:
            shutil.rmtree(folder)
    console.print(table)
    console.print(f"{name}: {same} of {points} killed runs came to the same {len(expected)} results")
    return same == points


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"any of {', '.join(JOBS)}; default: all")
    parser.add_argument("--points", type=int, default=20, help="how often each is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it; default: a temporary one")
    options = parser.parse_args(args)
    if options.jobs == ["_fit"]:  # what this command runs itself
        fit(options.keep)
        return 0
    unknown = sorted(set(options.jobs) - set(JOBS))
    if unknown or options.points < 1:
        parser.error(
            f"jobs: {unknown[0]!r} is none of {', '.join(JOBS)}" if unknown else "--points: expected at least 1"
        )
    jobs = list(dict.fromkeys(options.jobs or JOBS))
    if options.keep is not None and options.keep.is_file():
        parser.error(f"--keep {options.keep}: expected a folder, found a file")
    for folder in (options.keep / name for name in jobs if options.keep is not None):
        if folder.exists():  # a run would go on with what an earlier check has left there
            parser.error(f"--keep {options.keep}: {folder} is there already; remove it, or name another folder")
    rng, console, fine = random.Random(options.seed), Console(width=110), True
    with tempfile.TemporaryDirectory() as temporary:
        for name in jobs:
            common = (options.keep or Path(temporary)) / name
            common.mkdir(parents=True)
            fine &= check(name, common, options.points, rng, console)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
