"""A tiny pipeline as a folder, and a few clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import tiny
from univigu import UniViGUPipeline
from univigu.data.video import encode_mp4


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a UniViGUPipeline with random weights."""
    folder = tmp_path_factory.mktemp("pipeline")
    wan = tiny.make_pipeline()
    unified = tiny.make_unified(wan.transformer, len(wan.tokenizer), text_flow="mask")
    unified.register_to_config(text_length=12)
    parts = {name: wan.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    UniViGUPipeline(**parts, transformer=unified).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.mp4, 2.MP4, 3.mp4, where the second is broken, and a file that is no video's."""
    folder = tmp_path_factory.mktemp("clips")
    for name, seed in (("1.mp4", 1), ("3.mp4", 3)):
        frames = torch.randint(0, 256, (9, 3, 64, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        (folder / name).write_bytes(encode_mp4(frames))
    (folder / "2.MP4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="session")
def evaluate() -> Callable[[list[str]], int]:
    """The command."""
    from tools.evaluate import main

    return main
