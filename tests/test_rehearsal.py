"""The rehearsal's commands at a tiny size, in this process."""

from __future__ import annotations

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests import rehearsal
from univigu import cli
from univigu.checkpoint import load_weights
from univigu.models.foundation import Foundation

TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2, "text_dim": 32}
TINY |= dict.fromkeys(("in_channels", "out_channels"), 8)  # of the embedded world's VAE


@pytest.mark.slow
def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(command: list[str], root: Path) -> tuple[float, int]:
        monkeypatch.chdir(root)
        if command[0] == "-m":
            cli.main(command[2:])
        else:
            main: Any = importlib.import_module(f"tools.{Path(command[0]).stem}").main
            assert not main(command[1:])
        return 1.0, 2 * 10**9

    monkeypatch.setattr(rehearsal, "measure", measure)
    monkeypatch.setitem(rehearsal.WAN21, "Wan2.1-T2V-1.3B", TINY)
    monkeypatch.setattr(rehearsal, "TEXT_ENCODER", {"d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 1})
    monkeypatch.setattr(rehearsal, "UMT5_VOCAB_SIZE", len(Foundation().tokenizer))
    monkeypatch.setattr(rehearsal, "AutoencoderKLWan", lambda: Foundation().vae)
    monkeypatch.setattr(rehearsal, "SpawnPool", ThreadPoolExecutor)  # in which they are tiny, too
    rehearsal.rehearse(tmp_path / "made", "1.3b", 1, float32=True)
    assert capsys.readouterr().out.count(": 1 s, 2.00 GB\n") == 9
    root = tmp_path / "made"
    trained = load_weights(root / "model/transformer")
    assert trained.config.num_layers == 1 and trained.config.token_ids == json.loads(
        (root / "pruned/vocabulary.json").read_text()
    )
    assert trained.text_head.linear.weight.abs().sum() > 0
    with safe_open(root / "wan/transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.float32 for name in file.keys())  # noqa: SIM118
    (row,) = (root / "caption/captions.jsonl").read_text().splitlines()
    assert json.loads(row)["error"] is None
