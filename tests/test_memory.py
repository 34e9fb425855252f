"""Loading takes the memory of the model: at no time are there two copies of its weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests import tiny
from tests.conftest import added_memory, in_fork
from univigu.checkpoint import load_weights
from univigu.models.options import ArchitectureOptions
from univigu.models.transformer import UniViGUTransformer3DModel

SIZES = {"attention_head_dim": 64, "num_attention_heads": 8, "ffn_dim": 3072, "num_layers": 4, "text_dim": 64}
VOCAB = 4000
OWN = ArchitectureOptions("mask", text_attention="own")


def read(source: str, path: Path, dtype: torch.dtype) -> UniViGUTransformer3DModel:
    if source == "wan":
        return UniViGUTransformer3DModel.from_wan(path, VOCAB, OWN, dtype)
    if source == "from_pretrained":
        return UniViGUTransformer3DModel.from_pretrained(path, torch_dtype=dtype)
    return load_weights(path, dtype=dtype)


def num_bytes(model: torch.nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def write(source: str, path: Path, sizes: dict[str, Any], vocab_size: int) -> None:
    wan = tiny.make_wan(**sizes)
    if source == "wan":
        wan.save_pretrained(path, max_shard_size="40MB")
        return
    model = UniViGUTransformer3DModel.from_wan(wan, vocab_size, OWN)
    if source in ("folder", "from_pretrained"):
        model.save_pretrained(path, max_shard_size="80MB")
        return
    state = {f"transformer.{name}": value for name, value in model.state_dict().items()}
    info = {"univigu": {"transformer_config": {k: v for k, v in model.config.items() if k[0] != "_"}}}
    if source == "ckpt":
        moments = {name: torch.zeros_like(value) for name, value in state.items()}
        torch.save({"state_dict": state, "optimizer_states": [moments], **info}, path)
    else:
        means = {name.replace("transformer.", "ema."): value for name, value in state.items()}
        dcp.save({"state_dict": state | means}, checkpoint_id=path, no_dist=True)
        torch.save(info, path / "meta.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        ("wan", torch.bfloat16),
        ("wan", torch.float32),
        ("folder", torch.bfloat16),
        ("from_pretrained", torch.float32),
        ("ckpt", torch.float32),
        ("sharded", torch.float32),
    ],
)
def test_there_is_no_second_copy(source: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write(source, tmp_path / "tiny", {}, 11)
    write(source, tmp_path / "large", SIZES, VOCAB)
    size = num_bytes(read(source, tmp_path / "large", dtype))
    small, large = (partial(read, source, tmp_path / name, dtype) for name in ("tiny", "large"))
    if source == "wan":
        small = partial(UniViGUTransformer3DModel.from_wan, tmp_path / "tiny", 11)
    added = in_fork(added_memory, small, large)
    assert size > 60e6 and added < 1.2 * size, (added / size, size)  # what is mapped is not there before its use
