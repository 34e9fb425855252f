"""What each choice of the method is worth: recall trained again and again with one thing changed, over several seeds.

    python tools/ablate.py                         # every variant, three seeds; then tables and plots
    python tools/ablate.py --only recipe random    # some of them
    python tools/ablate.py --jobs 2                # two runs at once, half the cores each
    python tools/ablate.py --report                # no training, only tables and plots of what is there

Runs lie in ``--output``, one folder each; finished ones are not repeated, so an interrupted sweep goes on where it
was.  Tables replace what lies between the markers of ``--document``, plots go to the folder ``results`` beside it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from univigu.data.processes import usable_cores

BEGIN, END = "<!-- ablations: written by tools/ablate.py -->", "<!-- end of ablations -->"
GOALS = (0.5, 0.7, 0.9)  # mean accuracies whose first steps are compared
ATTRIBUTES = ("count", "background", "size", "color", "shape", "motion", "speed", "relation")
SETTINGS = ("steps", "every", "clips", "caption_steps", "overrides")  # of the call, which all runs of a table share
CONDITIONS = {"caption": "no prompt", "caption_with_prompt": "own prompt", "caption_with_other_prompt": "other prompt"}


@dataclass(frozen=True)
class Variant:
    """A change to ``configs/recall.yaml``."""

    title: str
    question: str
    """Under which heading its row stands."""
    model: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)


# The recipe leaves the generator's weights alone; what cannot work so is compared with "trained".
TRAINED = {"learning_rate": 5.0e-4, "tasks": {"joint": 0.25, "understand": 0.5, "generate": 0.25}}
READING = "text attention (recipe: own, of the video, too)"
VARIANTS = {
    "recipe": Variant("the recipe", ""),
    "trained": Variant("trained", "generator's weights (recipe: frozen)", {}, TRAINED),
    "uniform": Variant("uniform", "text flow (recipe: mask)", {"architecture": {"text_flow": "uniform"}}),
    "embedding": Variant("embedding", "text flow (recipe: mask)", {"architecture": {"text_flow": "embedding"}}),
    "random": Variant("random, trained", "initialisation (recipe: foundation)", {"init_from": "random"}, TRAINED),
    "random_fast": Variant(
        "random, trained at the text's rate",
        "initialisation (recipe: foundation)",
        {"init_from": "random"},
        TRAINED | {"learning_rate": 6.0e-3},
    ),
    "random_frozen": Variant("random, frozen", "initialisation (recipe: foundation)", {"init_from": "random"}),
    "dropout0": Variant(
        "0", "condition dropout (recipe: 0.9)", {}, {"condition_dropout": {"joint": 0.5, "understand": 0.0}}
    ),
    "dropout50": Variant(
        "0.5", "condition dropout (recipe: 0.9)", {}, {"condition_dropout": {"joint": 0.5, "understand": 0.5}}
    ),
    "shared": Variant(
        "shared, trained", "text FFN (recipe: separate)", {"architecture": {"separate_text_ffn": False}}, TRAINED
    ),
    "attention": Variant("shared", READING, {"architecture": {"text_attention": "shared"}}),
    "rotary": Variant("rotary", "positions of the text (recipe: learned)", {"architecture": {"text_positions": 0}}),
    "told0": Variant("0", "timestep told of clean video (recipe: 300)", {"architecture": {"clean_video_timestep": 0}}),
    "reads": Variant("yes", "clean video reads text (recipe: no)", {"architecture": {"clean_video_reads_text": True}}),
}


@dataclass
class Run:
    """One training: its variant, its seed, its folder."""

    variant: str
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    def settings(self) -> dict[str, Any]:
        """What a finished run was made with, see :data:`SETTINGS`."""
        settings: dict[str, Any] = json.loads((self.folder / "done").read_text())["settings"]
        return settings

    def curve(self, name: str) -> dict[int, float]:
        """Values by step of a logged metric."""
        with (self.folder / "metrics.csv").open() as file:
            return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}

    def final(self, name: str) -> float:
        """Its last value, NaN if it was never logged."""
        curve = self.curve(name)
        return curve[max(curve)] if curve else float("nan")


# ------------------------------------------------------------------ training


def read_configuration(path: Path) -> dict[str, Any]:
    """A stage's configuration with the overlay of the frozen recipe beside it."""
    config, overlay = (yaml.safe_load(file.read_text()) for file in (path, path.with_name("frozen.yaml")))
    (name,) = config["run"]
    config["stages"][name] |= overlay["stages"][name]
    config["model"] = config.get("model", {}) | overlay["model"]
    return config  # type: ignore[no-any-return]


def split_around(text: str, begin: str, end: str, name: str) -> tuple[str, str]:
    """The text of the file of that name up to its line ``begin``, and from its line ``end`` on; both included.

    Raises:
        ValueError: a line is missing.
    """
    if begin not in text or end not in text:
        raise ValueError(f"{name}: lacks the lines {begin!r} and {end!r} to write between")
    return text.split(begin)[0] + begin, end + text.split(end)[1]


def configuration(base: dict[str, Any], run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """The base configuration with the variant's change, shortened to the sweep's length."""
    config, variant = copy.deepcopy(base), VARIANTS[run.variant]
    config |= {"seed_everything": run.seed, "media": {"every_n_steps": 0}, "report": {"num_samples": 1}}
    trainer = config["trainer"]
    trainer |= {"default_root_dir": str(run.folder), "enable_progress_bar": False, "enable_checkpointing": False}
    trainer |= {"enable_model_summary": False, "val_check_interval": options.every, "log_every_n_steps": 50}
    trainer["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(run.folder), "name": "", "version": "", "flush_logs_every_n_steps": 50},
    }
    (name,) = config["run"]
    config["stages"][name] |= {"steps": options.steps} | variant.stage
    accuracy = {"every_n_steps": options.every, "num_clips": options.clips}
    trainer["callbacks"] = [{"class_path": "univigu.training.callbacks.CaptionAccuracy", "init_args": accuracy}]
    model = config.get("model", {})
    architecture = model.get("architecture", {}) | variant.model.get("architecture", {})
    config["model"] = model | variant.model | {"architecture": architecture}
    config["model"]["sampling"] = config["model"].get("sampling", {}) | {"caption_steps": options.caption_steps}
    return config


def train(run: Run, base: dict[str, Any], options: argparse.Namespace) -> None:
    """Train in a process of its own; a run that was cut off starts over.

    Raises:
        RuntimeError: it failed; names the log.
    """
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    path, log = run.folder / "config.yaml", run.folder / "log.txt"
    path.write_text(yaml.safe_dump(configuration(base, run, options)))
    command = [sys.executable, "-m", "univigu.cli", "fit", "--config", str(path), *options.overrides]
    environment = dict(os.environ)
    if options.jobs > 1:  # threads of several runs that outnumber the cores wait for each other, spinning
        environment |= {"OMP_NUM_THREADS": str(max(1, usable_cores() // options.jobs)), "OMP_WAIT_POLICY": "passive"}
    start = time.perf_counter()
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        raise RuntimeError(f"{run.folder.name} failed with exit code {code}: see {log}")
    settings = {name: getattr(options, name) for name in SETTINGS}
    done = {"seconds": round(time.perf_counter() - start), "settings": settings}
    (run.folder / "done").write_text(json.dumps(done) + "\n")


def check_settings(runs: list[Run], options: argparse.Namespace) -> None:
    """One table holds runs of one kind.

    With ``--report`` the options become those that the runs were made with.

    Raises:
        ValueError: finished runs that were made with other options than this call's, or than each other, by name.
    """
    finished = [run for run in runs if run.done]
    if options.report and finished:
        vars(options).update(finished[0].settings())
    for run in finished:
        for name, value in run.settings().items():
            if value != getattr(options, name):
                raise ValueError(
                    f"{run.folder}: made with {name}={value}, asked for is {getattr(options, name)}; remove it or give "
                    "another --output"
                )


def sweep(runs: list[Run], options: argparse.Namespace, console: Console) -> list[str]:
    """Train what is not done yet; a failed run is reported at the end and does not stop the others.

    The first one goes ahead of the others: it makes the data that all share.
    """
    base, failures = read_configuration(options.config), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=len(runs))

        def finish(run: Run) -> None:
            progress.update(task, description=f"{run.variant}, seed {run.seed}")
            if not run.done:
                try:
                    train(run, base, options)
                except RuntimeError as error:
                    failures.append(str(error))
            progress.advance(task)

        with ThreadPoolExecutor(options.jobs) as pool:
            for part in (runs[:1], runs[1:]):
                list(pool.map(finish, part))
    return failures


# ----------------------------------------------------------------- reporting


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent; of one value that alone."""
    deviation = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{deviation}"


def first_step(run: Run, goal: float) -> int | None:
    """The first measured step whose mean accuracy reaches the goal."""
    return next((step for step, value in sorted(run.curve("val/caption/mean").items()) if value >= goal), None)


def steps_to_goal(runs: list[Run], goal: float) -> str:
    steps = [first_step(run, goal) for run in runs]
    return ", ".join("never" if step is None else str(step) for step in steps)


def tables(groups: dict[str, list[Run]], options: argparse.Namespace) -> str:
    """Markdown: accuracy by property, what the condition does, and how soon the goal is reached."""
    seeds = max(len(runs) for runs in groups.values())
    lines = [
        f"{options.steps} steps of recall, {seeds} seeds, {options.clips} held-out clips, captions read off the video "
        f"without a prompt ({options.caption_steps} denoising steps). Percent, mean ± standard deviation over seeds "
        f"(without ±: one seed); "
        f"a clip counts as right in a property only if all its objects are. The last columns: the first measured "
        f"step (every {options.every}) with such a mean accuracy, for each seed.",
        "",
        "| changed | to | " + " | ".join(("mean", *ATTRIBUTES, *(f"steps to {g:.0%}" for g in GOALS))) + " |",
        "|---" * (len(ATTRIBUTES) + len(GOALS) + 3) + "|",
    ]
    for name, runs in groups.items():
        cells = [spread([run.final(f"val/caption/{key}") for run in runs]) for key in ("mean", *ATTRIBUTES)]
        cells += [steps_to_goal(runs, goal) for goal in GOALS]
        lines.append("| " + " | ".join([VARIANTS[name].question, VARIANTS[name].title, *cells]) + " |")
    lines += [
        "",
        "Mean accuracy under three conditions (given another clip's prompt, a model that copies is wrong):",
        "",
        "| condition dropout | " + " | ".join(CONDITIONS.values()) + " |",
        "|---|---|---|---|",
    ]
    for name in ("dropout0", "dropout50", "recipe"):
        if name in groups:
            cells = [spread([run.final(f"val/{key}/mean") for run in groups[name]]) for key in CONDITIONS]
            title = "0.9 (the recipe)" if name == "recipe" else VARIANTS[name].title
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plots(groups: dict[str, list[Run]], folder: Path) -> list[tuple[str, Path]]:
    """Draw the learning curves; returns titles and files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    figures = {
        "initialisation": (
            "Foundation against random initialisation",
            ("recipe", "trained", "random", "random_fast", "random_frozen"),
        ),
        "text_flow": ("Text flows", ("recipe", "uniform", "embedding")),
        "condition_dropout": ("Condition dropout, captions without a prompt", ("recipe", "dropout50", "dropout0")),
        "architecture": (
            "Attention and FFN",
            ("recipe", "own", "attention", "rotary", "trained", "shared", "reads", "told0"),
        ),
    }
    for file, (title, names) in figures.items():
        shown = [name for name in names if name in groups]
        if len(shown) < 2:
            continue
        panels = ("mean", "color", "shape", "motion")
        figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.4), sharey=True, layout="constrained")
        for axis, attribute in zip(axes, panels, strict=True):
            for number, name in enumerate(shown):
                draw(axis, groups[name], f"val/caption/{attribute}", label(name), f"C{number}")
            axis.set(title=attribute, xlabel="step", ylim=(0, 1.02))
            axis.grid(alpha=0.3)
        for goal in GOALS:
            axes[0].axhline(goal, color="gray", linewidth=0.6, linestyle="--")
        axes[0].set_ylabel("held-out caption accuracy")
        axes[0].legend(loc="lower right", fontsize="small")
        figure.suptitle(title)
        path = folder / f"{file}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        made.append((title, path))
    return made


def label(name: str) -> str:
    variant = VARIANTS[name]
    return f"{variant.question.split(' (')[0]}: {variant.title}" if variant.question else variant.title


def draw(axis: Any, runs: list[Run], metric: str, name: str, color: str) -> None:
    """Every seed as a thin line, their mean as a thick one."""
    curves = [run.curve(metric) for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    for curve in curves:
        axis.plot(steps, [curve[step] for step in steps], color=color, linewidth=0.7, alpha=0.5)
    axis.plot(steps, [mean(curve[step] for curve in curves) for step in steps], color=color, linewidth=2, label=name)


def write_report(groups: dict[str, list[Run]], options: argparse.Namespace) -> None:
    """Put tables and plots into the document, between the markers.

    Raises:
        ValueError: the document lacks a marker.
    """
    document: Path = options.document
    text = document.read_text() if document.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, after = split_around(text, BEGIN, END, str(document))
    pictures = plots(groups, document.parent / "results")
    body = [tables(groups, options)] + [f"![{title}](results/{path.name})" for title, path in pictures]
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text("\n\n".join([before, *body, after]))


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/ablate"), help="folder of the runs")
    parser.add_argument("--document", type=Path, default=Path("docs/RESULTS.md"))
    parser.add_argument("--config", type=Path, default=Path("configs/recall.yaml"), help="what is varied")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="variants")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each variant")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps a run")
    parser.add_argument("--every", type=int, default=100, help="steps between two measurements")
    parser.add_argument("--clips", type=int, default=128, help="held-out clips measured")
    parser.add_argument("--caption-steps", type=int, default=20, help="denoising steps of a caption")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; they share the processor's cores")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options, options.overrides = parser.parse_known_args(args)  # the rest goes to `lightning fit`
    for name in ("seeds", "steps", "every", "caption_steps", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")
    if not options.config.exists():
        parser.error(f"--config {options.config}: no such file")
    return options


def main(args: list[str] | None = None) -> int:
    options, console = parse(args), Console()
    runs = [
        Run(name, seed, (options.output / f"{name}-{seed}").resolve())
        for seed in range(options.seeds)  # seed by seed, so that a sweep cut short compares all variants
        for name in options.only
    ]
    try:
        check_settings(runs, options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failures = [] if options.report else sweep(runs, options, console)
    groups = {name: [run for run in runs if run.variant == name and run.done] for name in options.only}
    groups = {name: done for name, done in groups.items() if done}
    if not groups:
        failures.append(f"{options.output}: no finished run to report")
    else:
        write_report(groups, options)
        console.print(f"wrote {options.document}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
