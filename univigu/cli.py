"""The command line: ``lightning fit|validate|test|predict`` (also installed as ``univigu``).

lightning fit --config configs/recall.yaml
lightning predict --config configs/caption.yaml --data.videos 'clips/*.mp4'
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable


def main(args: list[str] | None = None) -> None:
    """Run the command line; user errors end in one line on standard error and exit code 2.

    Args:
        args: arguments without the program's name; None takes ``sys.argv``.
    """
    from univigu.command import UniViGUCLI  # heavy, so that importing this module costs nothing

    _quiet_known_warnings()
    if code := exit_code(lambda: UniViGUCLI(args=args)):
        sys.exit(code)


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
