"""The command line: ``lightning fit|validate|test|predict`` (also installed as ``univigu``).

lightning fit --config configs/recall.yaml
lightning predict --config configs/caption.yaml --data.videos 'clips/*.mp4'
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable

from univigu import __version__

SUBCOMMANDS = {
    "fit": "train: configs/recall.yaml, refine.yaml, two_stage.yaml, foundation.yaml",
    "validate": "held-out losses and scores on the validation split",
    "test": "held-out scores in both directions on the test split",
    "predict": "use a model: configs/caption.yaml, generate.yaml, joint.yaml, edit.yaml, qa.yaml",
}
"""What there is, and what it is for; the options of each stand in Lightning's parser."""

EXAMPLES = """examples:
  lightning fit --config configs/recall.yaml
  lightning fit --config configs/recall.yaml --config configs/wan2.1-1.3b.yaml --config configs/fsdp.yaml
  lightning predict --config configs/caption.yaml --data.videos 'clips/*.mp4'
  lightning fit --help     every option with its meaning and default"""


def main(args: list[str] | None = None) -> None:
    """Run the command line; user errors end in one line on standard error and exit code 2.

    Args:
        args: arguments without the program's name; None takes ``sys.argv``.
    """
    answer_at_once(sys.argv[1:] if args is None else args)
    from univigu.training.lightning_cli import UniViGUCLI  # heavy: torch, lightning and diffusers, seconds

    _quiet_known_warnings()
    if code := exit_code(lambda: UniViGUCLI(args=args)):
        sys.exit(code)


def answer_at_once(args: list[str]) -> None:
    """Help, the version and a misspelt subcommand, without the seconds that importing everything takes.

    Raises:
        SystemExit: 0 after ``--help`` or ``--version``, 2 where no subcommand of ours is named; otherwise it returns.
    """
    parser = argparse.ArgumentParser(
        "lightning",
        usage="%(prog)s [-h] [--version] {" + ",".join(SUBCOMMANDS) + "} [options]",
        description="Uni-ViGU: one diffusion transformer that makes video and understands it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"univigu {__version__}")
    subcommands = parser.add_subparsers(title="subcommands", metavar="")
    for name, text in SUBCOMMANDS.items():
        subcommands.add_parser(name, help=text)
    first = args[0] if args else None
    if first is None:
        parser.error(f"expected a subcommand: {', '.join(SUBCOMMANDS)}")
    elif first in ("-h", "--help", "--version"):
        parser.parse_args([first])
    elif not first.startswith("-") and first not in SUBCOMMANDS:
        parser.error(f"no subcommand {first!r}: expected one of {', '.join(SUBCOMMANDS)}")


def exit_code(run: Callable[[], object]) -> int:
    """Run a command: 0, or 2 after a user's mistake, which is told in one line on standard error.

    Mistakes are the errors of files (OSError) and of values (ValueError, which ours all are, and Lightning's
    MisconfigurationException); all others are faults of the program and keep their traceback.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run()
    except Exception as error:
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        if os.environ.get("UNIVIGU_DEBUG") or not isinstance(error, (OSError, ValueError, MisconfigurationException)):
            raise
        print(f"error: {error}\n(UNIVIGU_DEBUG=1 shows where)", file=sys.stderr)
        return 2
    return 0


def _quiet_known_warnings() -> None:
    """Silence advice that does not apply here; everything else is shown."""
    for message in (
        ".*does not have many workers.*",  # two cores, precomputed latents: one worker is right
        ".*exists and is not empty.*",  # checkpoints go to a fixed folder, so that the next stage finds them
        ".*smaller than the logging interval.*",  # we log by steps, not epochs
        ".*isinstance.treespec, LeafSpec.*",  # inside lightning
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)


if __name__ == "__main__":
    main()
