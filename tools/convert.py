"""Convert weights between formats; docs/WEIGHTS.md has a command for each.

    python tools/convert.py pipeline --checkpoint runs/refine/checkpoints/last.ckpt --output my_model

A checkpoint is a file, or the folder of a sharded one; transformer, pipeline and export-official accept a transformer
folder, too.
"""

import argparse
import sys
from pathlib import Path

from univigu.checkpoint import export_pipeline, load_weights, prune_foundation, prune_model, to_wan, used_tokens
from univigu.cli import ToolParser
from univigu.data.index import index_folder
from univigu.models.encode import OFFICIAL, Conventions
from univigu.models.foundation import EMBEDDED_FOUNDATION, Foundation
from univigu.models.official import export_official, import_official, import_wan


def convert(options: argparse.Namespace) -> None:
    """Do what the options say; a ValueError if the output folder holds anything, which could be part of a model."""
    if options.output.is_dir() and any(options.output.iterdir()):
        raise ValueError(f"--output {options.output}: this folder is not empty; delete it or choose another")
    checkpoint, output = options.checkpoint, options.output
    match options.command:
        case "foundation":
            export_pipeline(to_wan(load_weights(checkpoint)), options.source, output)
        case "transformer":
            load_weights(checkpoint).save_pretrained(output)
        case "pipeline":
            export_pipeline(load_weights(checkpoint), options.foundation, output)
        case "import-official":
            conventions = Conventions(options.latents == "normalized", options.null_condition, options.prompt_padding)
            import_official(checkpoint, options.wan, options.text_flow, conventions).save_pretrained(output)
        case "export-official":
            export_official(load_weights(checkpoint), output, options.step, options.accept_differences)
        case "wan":
            import_wan(checkpoint, options.config).save_pretrained(output)
        case "prune":
            samples = [ref.texts() for folder in options.texts for ref in index_folder(folder)[0]]
            answers = [pair["answer"] for texts in samples for pair in texts["qa"]]
            written = [text for texts in samples for text in (texts["prompt"], texts["caption"])]
            ids = used_tokens(Foundation(options.foundation), [*written, *answers, *options.keep])
            if checkpoint is None:
                prune_foundation(options.foundation, ids, output)
            else:
                prune_model(load_weights(checkpoint), ids).save_pretrained(output)
            print(f"{len(ids)} tokens")
    print(f"wrote {output}")


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    foundation = commands.add_parser("foundation", help="stage-0 checkpoint -> WanPipeline folder")
    foundation.add_argument("--source", type=Path, default=Path(EMBEDDED_FOUNDATION), help="gives what was not trained")
    commands.add_parser("transformer", help="checkpoint -> UniViGUTransformer3DModel folder")
    pipeline = commands.add_parser("pipeline", help="checkpoint -> UniViGUPipeline folder")
    pipeline.add_argument("--foundation", type=Path, default=Path(EMBEDDED_FOUNDATION), help="what it was trained from")
    official = commands.add_parser("import-official", help="the preview's .pth -> UniViGUTransformer3DModel folder")
    official.add_argument("--wan", type=Path, required=True, help="Wan folder in diffusers' layout; gives the sizes")
    official.add_argument("--text-flow", choices=["uniform", "mask"], default="uniform")
    official.add_argument("--latents", choices=["raw", "normalized"], default="raw", help="what it was trained on")
    official.add_argument("--null-condition", choices=["zeros", "encoded"], default=OFFICIAL.null_condition)
    official.add_argument("--prompt-padding", choices=["zeros", "encoded"], default=OFFICIAL.prompt_padding)
    export = commands.add_parser("export-official", help="checkpoint or transformer folder -> the preview's .pth")
    export.add_argument("--step", type=int, default=0, help="number to store beside the weights")
    export.add_argument("--accept-differences", action="store_true", help="also a model of other conventions")
    wan = commands.add_parser("wan", help="Wan's original .pth or .safetensors -> WanTransformer3DModel folder")
    wan.add_argument("--config", type=Path, help="folder whose config.json gives the sizes; default: by the weights")
    prune = commands.add_parser("prune", help="WanPipeline folder (with --checkpoint: transformer) for fewer tokens")
    prune.add_argument("--foundation", type=Path, default=Path(EMBEDDED_FOUNDATION), help="gives the tokenizer")
    prune.add_argument("--texts", type=Path, nargs="+", required=True, help="shards whose texts it must write")
    prune.add_argument("--keep", nargs="+", default=[], help="further texts")
    for name, command in commands.choices.items():
        command.add_argument("--checkpoint", type=Path, required=name != "prune")
        command.add_argument("--output", type=Path, required=True)
    return parser.run(convert, args)


if __name__ == "__main__":
    sys.exit(main())
