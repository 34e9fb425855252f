"""Count the parameters, operations and memory that a configuration needs, without running it.

    python tools/plan.py --config configs/recall.yaml --config configs/wan2.1-1.3b.yaml --config configs/fsdp.yaml \
        --world-size 8 --device h100
    python tools/plan.py --config configs/two_stage.yaml --modules     # parameters added, per module

Further options are those of ``lightning fit``.  The weights are not needed: if the foundation's folder does not exist,
its sizes are Wan2.1's published ones, chosen by the folder's name.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from univigu.cli import ToolParser, exit_code
from univigu.training.plan import Workload, added_parameters, make_plan, workloads_of

# Dense bfloat16 operations a second, by the makers' data sheets.
DEVICES = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}

CONVERTED = 0.3  # gigabytes of the part of a large weight that is converted at a time; nothing else is held twice


def plan_table(title: str, work: Workload, options: argparse.Namespace) -> Table:
    """One stage's numbers."""
    plan, checkpointed = (make_plan(work, options.world_size, checkpointing) for checkpointing in (False, True))
    table = Table(title=f"{title}, batch {work.batch_size} on each of {options.world_size}", show_header=False)
    table.add_row("parameters", f"{plan.parameters:,} ({plan.wan_parameters:,} of them Wan's)")
    table.add_row("trained in this stage", f"{plan.trained_parameters:,}")
    table.add_row("video tokens a clip", f"{work.video_tokens:,}")
    operations = f"{plan.flops / 1e12:,.3f} T ({checkpointed.flops / 1e12:,.3f} T with checkpointing)"
    table.add_row("operations a step and process", operations)
    half, whole = (width * plan.parameters / 1e9 + CONVERTED for width in (2, 4))
    table.add_row("loading it for use takes of host memory", f"{half:.1f} GB in bfloat16, {whole:.1f} GB in float32")
    for name in ("weights", "gathered", "gradients", "optimizer"):
        table.add_row(name, f"{getattr(plan, name) / 1e9:.3f} GB")
    for name in ("activations", "total"):
        kept, recomputed = (getattr(counted, name) / 1e9 for counted in (plan, checkpointed))
        table.add_row(name, f"{kept:.3f} GB, checkpointed {recomputed:.3f} GB")
    if options.device:
        seconds = plan.flops / (DEVICES[options.device] * options.utilisation)
        table.add_row(f"a step on {options.device}, {options.utilisation:.0%} used", f"{seconds:.3f} s")
    table.caption = "Not counted: the frozen text encoder and VAE, the libraries' own memory, fragmentation."
    return table


def modules_table(title: str, work: Workload) -> Table:
    """What the text stream (and adapters) add to Wan."""
    table = Table("module", "parameters", "added to Wan", "trained", title=title)
    rows = added_parameters(work.model())
    total, added, trained = (sum(row[i] for row in rows.values()) for i in range(3))
    for module, numbers in [*rows.items(), ("together", (total, added, trained))]:
        table.add_row(module, *(f"{number:,}" for number in numbers))
    table.caption = f"added: {added / (total - added):.1%} of Wan's own {total - added:,}"
    return table


def run(options: argparse.Namespace, rest: list[str]) -> None:
    if not 0 < options.utilisation <= 1:
        raise ValueError(f"--utilisation {options.utilisation}: expected a share over 0 and at most 1")
    for name, work in workloads_of(rest).items():
        title = f"stage {name}" + (", LoRA" if work.lora else "")
        table = modules_table(title, work) if options.modules else plan_table(title, work, options)
        Console(width=100).print(table)


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--world-size", type=int, default=1, help="processes the transformer is sharded over")
    parser.add_argument("--device", choices=sorted(DEVICES), help="to tell the time of a step")
    parser.add_argument("--utilisation", type=float, default=0.45, help="share of its operations that are of use")
    parser.add_argument("--modules", action="store_true", help="parameters added and trained, per module")
    options, rest = parser.parse_known_args(args)
    return exit_code(lambda: run(options, rest))


if __name__ == "__main__":
    sys.exit(main())
