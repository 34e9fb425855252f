"""The command line: ``lightning fit|validate|test|predict`` (also installed as ``univigu``).

lightning fit --config configs/recall.yaml
lightning predict --config configs/caption.yaml --data.videos 'clips/*.mp4'
"""

from __future__ import annotations

import logging
import os
import sys
import warnings


def main(args: list[str] | None = None) -> None:
    """Run the command line; user errors end in one line on standard error and exit code 2.

    Args:
        args: arguments without the program's name; None takes ``sys.argv``.
    """
    # Everything heavy is imported here, so that importing this module costs nothing.
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from univigu.checkpoint import CheckpointError
    from univigu.command import UniViGUCLI
    from univigu.data import DataError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_known_warnings()
    try:
        UniViGUCLI(args=args)
    except (CheckpointError, DataError, MisconfigurationException, FileNotFoundError, ValueError) as error:
        if os.environ.get("UNIVIGU_DEBUG"):
            raise
        print(f"error: {error}\n(UNIVIGU_DEBUG=1 shows where)", file=sys.stderr)
        sys.exit(2)


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
