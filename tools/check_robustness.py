"""Load a thousand damaged inputs, mixed with sound ones, through the real loader.

    python tools/check_robustness.py                        # 1,000 damaged, 250 sound
    python tools/check_robustness.py --damaged 5000 --workers 2 --output runs/damaged

Prints what became of each kind of damage, and ends with exit code 1 unless every damaged input was counted, none of
them came through, and every sound sample arrived.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.damage import kind_of, write_damaged
from univigu.data.datamodule import VideoTextDataModule


def load(folder: Path, workers: int) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """Read everything through the data module.

    Returns:
        how often each key arrived, and the reasons that damaged inputs were left out for, by kind.
    """
    data = VideoTextDataModule(shards=str(folder), batch_size=8, num_workers=workers, precompute=False)
    data.prepare_data()
    data.setup("validate")
    arrived: Counter[str] = Counter()
    loader = data.val_dataloader()
    for batch in track(loader, "loading", len(loader), console=Console(stderr=True)):
        assert all(len(batch[name]) == len(batch["key"]) for name in ("video", "prompt_ids", "caption_ids"))
        arrived.update(batch["key"])
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for shard, key, reason in data.errors.seen:
        reasons[kind_of(shard, key)][reason] += 1
    return arrived, reasons


def check(folder: Path, damaged: int, good: int, workers: int, seed: int) -> bool:
    """Write, load, print; whether all is as it should be."""
    console, start = Console(width=110), time.perf_counter()
    sound = write_damaged(folder / "val", damaged, good, seed=seed)
    written = time.perf_counter()
    arrived, reasons = load(folder, workers)
    table = Table("damage", "reasons", "inputs", title=f"{damaged} damaged inputs among {good} sound samples")
    for kind, counts in sorted(reasons.items()):
        table.add_row(kind, ", ".join(f"{name} {n}" for name, n in sorted(counts.items())), str(counts.total()))
    console.print(table)
    counted = sum(counts.total() for counts in reasons.values())
    lost, passed = sorted(sound - set(arrived)), sorted(set(arrived) - sound)
    console.print(f"counted {counted} of {damaged} damaged inputs; {len(passed)} came through {passed[:5]}")
    console.print(f"{len(sound) - len(lost)} of {good} sound samples arrived; lost {lost[:5]}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = written - start, time.perf_counter() - written
    console.print(
        f"{seconds[0]:.1f} s to write, {seconds[1]:.1f} s to load; peak memory of this process {peak:.2f} GiB"
    )
    return counted == damaged and not lost and not passed


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damaged", type=int, default=1000, help="damaged inputs")
    parser.add_argument("--good", type=int, default=250, help="sound samples among them, half of them odd ones")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="keep the inputs here; default: a temporary folder")
    options = parser.parse_args(args)
    logging.getLogger("univigu").setLevel(logging.ERROR)  # a line for each of a thousand is of no use here
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        fine = check(folder, options.damaged, options.good, options.workers, options.seed)
    print("all as it should be" if fine else "NOT as it should be")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
