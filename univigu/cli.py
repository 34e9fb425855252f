"""The command line: ``lightning fit|validate|test|predict|demo`` (also installed as ``univigu``), see ``HELP``."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from univigu import __version__

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a bar for every component that is loaded
SUBCOMMANDS = {
    "fit": "train: configs/recall.yaml, refine.yaml, two_stage.yaml, foundation.yaml",
    "validate": "held-out losses and scores on the validation split",
    "test": "held-out scores in both directions on the test split",
    "predict": "use a model: configs/caption.yaml, generate.yaml, joint.yaml, edit.yaml, qa.yaml",
    "demo": "a web page to use a model on",
}
HELP = f"""usage: lightning [-h] [--version] {{{",".join(SUBCOMMANDS)}}} [options]

Uni-ViGU: one diffusion transformer that makes video and understands it.

subcommands:
{"".join(f"  {name:9} {text}" + chr(10) for name, text in SUBCOMMANDS.items())}
examples:
  lightning fit --config configs/recall.yaml
  lightning fit --config configs/recall.yaml --config configs/wan2.1-1.3b.yaml --config configs/fsdp.yaml
  lightning predict --config configs/caption.yaml --data.videos 'clips/*.mp4'
  lightning fit --help     every option with its meaning and default

UNIVIGU_DEBUG=1 shows where an error comes from."""


def main(args: list[str] | None = None) -> None:
    """Run the command line with the arguments of ``sys.argv``, or those given without the program's name."""
    given = sys.argv[1:] if args is None else args
    answer_at_once(given)
    if given[0] == "demo":
        from univigu.demo import main as serve

        sys.exit(exit_code(lambda: serve(given[1:])))
    from univigu.training.lightning_cli import UniViGUCLI  # heavy: torch, lightning and diffusers, seconds

    if code := exit_code(lambda: UniViGUCLI(args=args)):
        sys.exit(code)


def answer_at_once(args: list[str]) -> None:
    """Answer help, the version and a misspelt subcommand, and exit, without importing everything for seconds."""
    first = args[0] if args else ""
    if first in ("-h", "--help", "--version"):
        print(f"univigu {__version__}" if first == "--version" else HELP)
        sys.exit(0)
    if first not in SUBCOMMANDS and not first.startswith("-"):
        found = f"no subcommand {first!r}{closest(first, SUBCOMMANDS)}" if first else "expected a subcommand;"
        fail(f"{found} there are {', '.join(SUBCOMMANDS)}", "lightning")


def fail(message: str, command: str) -> NoReturn:
    """End the program: one line on standard error, with the command that shows more, and exit code 2."""
    print(f"error: {message} ({command} --help shows all options)", file=sys.stderr)
    sys.exit(2)


def closest(name: str, names: Iterable[str]) -> str:
    """What may have been meant, to be added to a message; empty if no name is close."""
    found = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {found[0]}?" if found else ""


def one_line(message: object) -> str:
    """A message of several lines in one; of a class that could not be made, the reason."""
    reason = re.search(r"Problem with given (class_path .*?)\n *- Expected", str(message), re.DOTALL)
    lines = (reason[1] if reason else str(message)).splitlines()
    return "; ".join(line.strip() for line in lines if line.strip())


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser and of its subcommands."""
    options = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            options = options.union(*map(options_of, action.choices.values()))
    return options


class ToolParser(argparse.ArgumentParser):
    """The parser of ``tools/*.py``: it prints its description as it is written, and mistakes in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            unknown = re.split("[ =]", message.removeprefix("unrecognized arguments: "))[0]
            message = f"unknown option {unknown}{closest(unknown, options_of(self))}"
        fail(message, self.prog)

    def run(self, work: Callable[[argparse.Namespace], object], args: list[str] | None) -> int:
        """Parse the arguments, print what is logged, and do the work with the options, see ``exit_code``."""
        options = self.parse_args(args)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return exit_code(lambda: work(options))


def exit_code(run: Callable[[], object]) -> int:
    """Run a command: 0, or 2 after a user's mistake, which is printed in one line on standard error.

    Mistakes are OSError, ValueError and Lightning's MisconfigurationException; other errors keep their traceback.

    Raises:
        SystemExit: after SIGTERM (143) or SIGINT (130).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_known_warnings()
    numbers = (signal.SIGTERM, signal.SIGINT)
    earlier = {number: signal.signal(number, lambda n, _: sys.exit(128 + n)) for number in numbers}
    try:
        run()
    except Exception as error:
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        mistakes = (OSError, ValueError, MisconfigurationException)
        if os.environ.get("UNIVIGU_DEBUG") or not isinstance(error, mistakes):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    return 0


def _quiet_known_warnings() -> None:
    """Silence what nobody can act on, by message; everything else is shown."""
    for message in (
        ".*does not have many workers.*",  # two cores, precomputed latents: one worker is right
        ".*exists and is not empty.*",  # checkpoints go to a fixed folder, so that the next stage finds them
        ".*smaller than the logging interval.*",  # we log by steps, not epochs
        ".*isinstance.treespec, LeafSpec.*",  # inside lightning
        r"Found \d+ module\(s\) in eval mode at the start of training.*",  # dropout that is never used
        "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need.*",  # evaluation has others
        "LightningCLI's args parameter is intended to run from within Python.*",  # tools give it theirs
        "Mismatch dtype between input and weight.*",  # float32 norms of bfloat16 values, as Wan has them
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)


if __name__ == "__main__":
    main()
