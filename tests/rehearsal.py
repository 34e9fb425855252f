"""Rehearse the work with Wan2.1 at its true size: seconds and peak memory of every step, without a download.

    python tests/rehearsal.py --size 1.3b --output runs/rehearsal

It writes a folder of Wan2.1-T2V's layout, configurations, dtypes and shard index with random weights, and runs the
README's commands on it at 64x64, 5 frames, on a CPU: synthesize, encode, fit, convert, predict. Apart from the weights
the folder is true but for the tokenizer (the embedded world's) and the depth of the text encoder (1 layer of 24). What
is trained has --train-layers of the transformer's layers, since optimizer states of all of them take too much memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from univigu.cli import ToolParser
from univigu.data.engine import SpawnPool
from univigu.data.video import encode_mp4
from univigu.models.foundation import COMPONENTS, Foundation
from univigu.models.official import UMT5_VOCAB_SIZE
from univigu.shapes.scenes import sample_scene
from univigu.shapes.texts import prompt_of
from univigu.training.plan import WAN21

TEXT_ENCODER = {"d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 1}


def write_folders(root: Path, size: str, num_layers: int) -> None:
    """A foundation as ``hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers`` makes it, and the same one with fewer layers."""
    options = WAN21[f"Wan2.1-T2V-{size.upper()}"]
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=UMT5_VOCAB_SIZE, d_model=options["text_dim"], **TEXT_ENCODER))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = Foundation().tokenizer, encoder, AutoencoderKLWan(), scheduler, WanTransformer3DModel(**options)
    WanPipeline(*parts).save_pretrained(root / "wan", max_shard_size="5GB")
    (root / "short").mkdir()
    for name in {*COMPONENTS, "model_index.json"} - {"transformer"}:
        (root / "short" / name).symlink_to(root / "wan" / name)
    WanTransformer3DModel(**options | {"num_layers": num_layers}).save_pretrained(root / "short" / "transformer")


def commands(size: str) -> dict[str, str]:
    """Each step's command without the interpreter, by its name; paths are relative to the rehearsal's folder."""
    run, small = "-m univigu.cli", "--height 64 --width 64 --num-frames 5 --device cpu"
    clip = "--data.height=64 --data.width=64 --data.num_frames=5 --data.num_workers=0 --trainer.accelerator=cpu"
    fit = (
        f"--config=configs/wan2.1-{size}.yaml --config=configs/frozen.yaml {clip} --model.foundation=pruned"
        " --data.shards=data-encoded --data.batch_size=1 --trainer.max_steps=2 --trainer.precision=bf16-true"
        " --trainer.limit_val_batches=0 --data.length_filter.min_caption=1 --report.num_samples=1"
        " --model.optimizer.name=muon --media.every_n_steps=0 --model.sampling.caption_steps=1"
    )
    caption = (
        f"{run} predict --config=configs/caption.yaml {clip} --data.videos=clip.mp4"
        " --trainer.default_root_dir=caption --model.sampling.caption_steps=2"
    )
    whole = f"{caption} --model.foundation=wan --model.init_from=null"
    return {
        "synthesize, 2 steps": f"tools/synthesize.py --prompts prompts.txt --pipeline wan {small} --fps 16 --steps 2"
        " --batch-size 1 --dtype bfloat16 --min-caption 1 --output data/train",
        "encode": f"tools/encode.py --source data --output data-encoded --foundation wan {small} --dtype float16",
        "prune the vocabulary": "tools/convert.py prune --foundation short --texts data --output pruned",
        "fit recall, 2 steps": f"{run} fit --config=configs/recall.yaml {fit} --trainer.default_root_dir=recall",
        "fit refine, 2 steps": f"{run} fit --config=configs/refine.yaml {fit} --trainer.default_root_dir=refine"
        " --model.init_from=recall/checkpoints/last.ckpt",
        "convert": "tools/convert.py pipeline --checkpoint refine/checkpoints/last.ckpt --foundation pruned"
        " --output model",
        "predict": f"{caption} --model.foundation=model --model.init_from=model/transformer"
        " --trainer.precision=bf16-true",
        "predict, all layers and tokens, bfloat16": f"{whole} --trainer.precision=bf16-true",
        "predict, all layers and tokens, float32": whole,
    }


def measure(command: list[str], root: Path) -> tuple[float, int]:
    """Run a command with this interpreter in a folder; its seconds and peak memory in bytes."""
    start, process = time.perf_counter(), subprocess.Popen([sys.executable, *command], cwd=root)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise ValueError(f"this command failed: {' '.join(command)}")
    return time.perf_counter() - start, 1024 * usage.ru_maxrss


def rehearse(output: Path, size: str, train_layers: int, float32: bool) -> None:
    """Write the folders, run every command and print seconds and peak memory of each."""
    (root := output.resolve()).mkdir(parents=True)  # a FileExistsError if there is a rehearsal
    with SpawnPool(1) as pool:  # a process's peak includes that of the one that starts it
        pool.submit(write_folders, root, size, train_layers).result()
    (root / "prompts.txt").write_text("".join(prompt_of(sample_scene(seed)) + "\n" for seed in range(2)))
    (root / "clip.mp4").write_bytes(encode_mp4(torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)))
    for name in ("tools", "configs"):
        (root / name).symlink_to(Path(__file__).resolve().parents[1] / name)
    for name, command in commands(size).items():
        if float32 or not name.endswith("float32"):
            seconds, peak = measure(command.split(), root)
            print(f"{name}: {seconds:.0f} s, {peak / 1e9:.2f} GB", flush=True)


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/rehearsal"), help="folder of everything it writes")
    parser.add_argument("--size", choices=["1.3b", "14b"], default="1.3b", help="of the transformer and VAE")
    parser.add_argument("--train-layers", type=int, default=4, help="layers of the transformer that is trained")
    parser.add_argument("--float32", action="store_true", help="caption in float32, too (18 GB at 1.3b)")
    return parser.run(lambda options: rehearse(**vars(options)), args)


if __name__ == "__main__":
    sys.exit(main())
