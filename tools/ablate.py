"""Train recall many times, each time with one choice changed and over several seeds, and write a table.

    python tools/ablate.py                         # every variant, three seeds
    python tools/ablate.py --only recipe random    # some of them

Further options go to ``lightning fit``.  Runs lie in ``--output``, one folder each with its curves in metrics.csv.
tables.md beside them is written after every run.  Finished runs are not repeated, so an interrupted sweep continues.
"""

import argparse
import csv
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from univigu.cli import ToolParser, exit_code
from univigu.cli import main as lightning
from univigu.training.callbacks.held_out import markdown_table

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GOALS = (0.5, 0.7, 0.9)  # mean accuracies; the table tells when a run first reaches them
ATTRIBUTES = ("count", "background", "size", "color", "shape", "motion", "speed", "relation")
PROMPTED = ("caption_with_prompt", "caption_with_other_prompt")

# The frozen recipe does not train the generator; variants that need it trained are compared with "trained".
TRAINED = ("stages.recall.learning_rate=5e-4", "stages.recall.tasks={joint: 0.25, understand: 0.5, generate: 0.25}")


class Variant(NamedTuple):
    """A choice and its value as the table names them, the options of ``lightning fit`` for it, its configurations."""

    heading: str
    value: str
    options: tuple[str, ...] = ()
    configs: tuple[str, ...] = ("recall", "frozen")


VARIANTS = {
    "recipe": Variant("", "configs/frozen.yaml"),
    "paper": Variant("recipe (frozen)", "the paper's", configs=("recall",)),
    "trained": Variant("generator's weights (recipe: frozen)", "trained", TRAINED),
    "uniform": Variant("text flow (recipe: mask)", "uniform", ("model.architecture.text_flow=uniform",)),
    "embedding": Variant("text flow (recipe: mask)", "embedding", ("model.architecture.text_flow=embedding",)),
    "random": Variant("initialisation (recipe: foundation)", "random, trained", (*TRAINED, "model.init_from=random")),
    "random_frozen": Variant("initialisation (recipe: foundation)", "random, frozen", ("model.init_from=random",)),
    "dropout0": Variant("condition dropout (recipe: 0.9)", "0", ("stages.recall.condition_dropout.understand=0",)),
    "dropout50": Variant("condition dropout (recipe: 0.9)", "0.5", ("stages.recall.condition_dropout.understand=0.5",)),
    "ffn": Variant(
        "text FFN (recipe: separate)", "shared, trained", (*TRAINED, "model.architecture.separate_text_ffn=false")
    ),
    "attention": Variant("text attention (recipe: own)", "shared", ("model.architecture.text_attention=shared",)),
    "rotary": Variant("text positions (recipe: learned)", "rotary", ("model.architecture.text_positions=0",)),
    "timestep": Variant("timestep of clean video (recipe: 300)", "0", ("model.architecture.clean_video_timestep=0",)),
    "reads": Variant("clean video reads text (recipe: no)", "yes", ("model.architecture.clean_video_reads_text=true",)),
}


@dataclass
class Run:
    """One training: its variant, its folder, and its options of ``lightning fit``."""

    variant: str
    folder: Path
    options: list[str]

    @property
    def done(self) -> Path:
        """The file that a finished run has; it holds the options of the run."""
        return self.folder / "done"

    def curve(self, name: str) -> dict[int, float]:
        """Values of a logged metric by step; NaN at step 0 if it was never logged."""
        with (self.folder / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row.get(name)]
        return {int(row["step"]): float(row[name]) for row in rows} or {0: float("nan")}

    def first_step(self, goal: float) -> str:
        """The first measured step whose mean accuracy reaches the goal."""
        curve = self.curve("val/caption/mean").items()
        return next((str(step) for step, value in curve if value >= goal), "never")

    def check(self) -> None:
        """Raise ValueError if it is finished with other options: all runs of the table have the same."""
        made = json.loads(self.done.read_text()) if self.done.exists() else self.options
        if made != self.options:
            other = " ".join(option for option in made if option not in self.options)
            wanted = " ".join(option for option in self.options if option not in made)
            told = f"made with {other or 'fewer options'}, asked for is {wanted or 'fewer options'}"
            raise ValueError(f"{self.folder}: {told}; remove it or give another --output")


def plan(variant: str, seed: int, options: argparse.Namespace) -> Run:
    """The run of a variant and seed."""
    folder = (options.output / f"{variant}-{seed}").resolve()
    logger = {"save_dir": str(folder), "name": "", "version": "", "flush_logs_every_n_steps": 50}
    accuracy = {"every_n_steps": options.every, "num_clips": options.clips}
    callback = {"class_path": "univigu.training.callbacks.CaptionAccuracy", "init_args": accuracy}
    values = {
        "seed_everything": seed,
        "stages.recall.steps": options.steps,
        "trainer.default_root_dir": folder,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_model_summary": "false",
        "trainer.val_check_interval": options.every,
        "trainer.log_every_n_steps": 50,
        "trainer.logger": json.dumps({"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}),
        "trainer.callbacks": json.dumps([callback]),
        "media.every_n_steps": 0,
        "report.num_samples": 1,
        "model.sampling.caption_steps": options.caption_steps,
    }
    chosen = VARIANTS[variant]
    settings = [*(f"{name}={value}" for name, value in values.items()), *chosen.options]
    given = [f"config={CONFIGS / name}.yaml" for name in chosen.configs] + settings
    return Run(variant, folder, [*(f"--{option}" for option in given), *options.overrides])


def table(runs: list[Run], options: argparse.Namespace) -> str:
    """Markdown: for each variant the accuracies of its seeds, and the steps to reach the goals."""
    names = [f"caption/{key}" for key in ("mean", *ATTRIBUTES)] + [f"{name}/mean" for name in PROMPTED]
    head = ["changed", "to", "mean", *ATTRIBUTES, "own prompt", "other prompt", *(f"steps to {g:.0%}" for g in GOALS)]
    about = (
        f"{options.steps} steps of recall, {options.seeds} seeds, {options.clips} held-out clips, "
        f"captions of the video without a prompt ({options.caption_steps} denoising steps). "
        "Percent, mean ± standard deviation over seeds. "
        "A clip counts as right in an attribute only if all its objects are. "
        "The mean is also given under the clip's own prompt and under another clip's, where copying is wrong. "
        f"The last columns: the first step (every {options.every}) with such a mean accuracy, for each seed."
    )
    rows = []
    for variant in dict.fromkeys(run.variant for run in runs):
        group = [run for run in runs if run.variant == variant]
        cells = [VARIANTS[variant].heading, VARIANTS[variant].value]
        for values in [[100 * list(run.curve(f"val/{name}").values())[-1] for run in group] for name in names]:
            cells.append(f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
        rows.append(cells + [", ".join(run.first_step(goal) for run in group) for goal in GOALS])
    return f"{about}\n\n{markdown_table(head, rows)}\n"


def sweep(options: argparse.Namespace) -> None:
    """Train what is not finished, seed by seed, so that an interrupted sweep compares all variants."""
    if options.seeds < 1:  # fit itself checks the other numbers
        raise ValueError(f"--seeds {options.seeds}: expected at least 1")
    runs = [plan(variant, seed, options) for seed in range(options.seeds) for variant in options.only]
    for run in runs:
        run.check()
    for run in runs:
        if not run.done.exists():
            shutil.rmtree(run.folder, ignore_errors=True)  # one that was interrupted starts again
            run.folder.mkdir(parents=True)
            print(f"{run.folder.name} ...", flush=True)
            lightning(["fit", *run.options])
            run.done.write_text(json.dumps(run.options))
        (options.output / "tables.md").write_text(table([run for run in runs if run.done.exists()], options))
    print(f"wrote {options.output / 'tables.md'}")


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/ablate"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="variants")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each variant")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps per run")
    parser.add_argument("--every", type=int, default=100, help="steps between two measurements")
    parser.add_argument("--clips", type=int, default=128, help="held-out clips per measurement")
    parser.add_argument("--caption-steps", type=int, default=20, help="denoising steps per caption")
    options, options.overrides = parser.parse_known_args(args)
    return options


def main(args: list[str] | None = None) -> int:
    return exit_code(lambda: sweep(parse(args)))


if __name__ == "__main__":
    sys.exit(main())
