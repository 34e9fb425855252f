"""Convert weights between the forms they come in.

    python tools/convert.py foundation --checkpoint runs/foundation/checkpoints/last.ckpt \
        --source runs/foundation/start --output my_foundation
    python tools/convert.py transformer --checkpoint runs/refine/checkpoints/last.ckpt --output my_transformer
    python tools/convert.py pipeline --checkpoint runs/refine/checkpoints/last.ckpt --output my_model
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from univigu.checkpoint import CheckpointError, export_foundation, export_pipeline, load_weights
from univigu.models.foundation import EMBEDDED_FOUNDATION


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    foundation = commands.add_parser("foundation", help="stage-0 checkpoint -> WanPipeline folder")
    foundation.add_argument("--source", type=Path, default=Path(EMBEDDED_FOUNDATION), help="gives what was not trained")
    transformer = commands.add_parser("transformer", help="checkpoint -> UniViGUTransformer3DModel folder")
    pipeline = commands.add_parser("pipeline", help="checkpoint -> UniViGUPipeline folder")
    pipeline.add_argument("--foundation", type=Path, default=Path(EMBEDDED_FOUNDATION), help="what it was trained from")
    for command in (foundation, transformer, pipeline):
        command.add_argument("--checkpoint", type=Path, required=True)
        command.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(args)
    try:
        if options.command == "foundation":
            export_foundation(options.checkpoint, options.source, options.output)
        elif options.command == "pipeline":
            export_pipeline(options.checkpoint, options.foundation, options.output)
        else:
            load_weights(options.checkpoint).save_pretrained(options.output)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
