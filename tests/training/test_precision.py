"""``bf16-true``: what is not trained is bfloat16, what is trained is float32, in every stage and after resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from tests import tiny
from tests.training import test_stages as stages
from univigu.checkpoint import load_weights
from univigu.models.lora import LoraOptions
from univigu.models.text import is_text_parameter
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.training.callbacks import WeightEMA
from univigu.training.lightning_cli import UniViGUCLI
from univigu.training.module import UniViGU
from univigu.training.stages import StageSwitch

FROZEN = {"recall": replace(stages.RECALL, steps=6)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foundation")
    tiny.make_pipeline().save_pretrained(path)
    return path


def fit(folder: Path, root: Path, plan: Any, precision: str, ckpt_path: Path | None = None, **options: Any) -> UniViGU:
    module = UniViGU(str(folder), optimizer=stages.ADAMW, seed=3, **options)
    saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = stages.make_trainer(root, [StageSwitch(plan), WeightEMA(), saver], precision=precision)
    loader: DataLoader = DataLoader(stages.Clips(), batch_size=stages.BATCH)
    trainer.fit(module, loader, ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=True)
    module.losses = {name: float(value) for name, value in trainer.callback_metrics.items()}  # type: ignore[assignment]
    return module


def kept(name: str) -> bool:
    """Whether diffusers keeps it in float32."""
    return bool(set(UniViGUTransformer3DModel._keep_in_fp32_modules) & set(name.split(".")))


@pytest.mark.slow
def test_trained_weights_are_float32_and_resumed_exactly(folder: Path, tmp_path: Path) -> None:
    whole = fit(folder, tmp_path, FROZEN, "bf16-true")
    resumed = fit(folder, tmp_path / "again", FROZEN, "bf16-true", tmp_path / "step=3.ckpt")
    exact = fit(folder, tmp_path / "exact", FROZEN, "32-true")
    wan = tiny.make_wan().state_dict()
    for name, value in whole.transformer.state_dict().items():  # type: ignore[union-attr]
        text = is_text_parameter(name)
        assert value.dtype == (torch.float32 if text or kept(name) else torch.bfloat16), name
        assert torch.equal(value, resumed.transformer.state_dict()[name]), name  # type: ignore[union-attr]
        if not text:
            assert torch.equal(value, wan[name].to(value.dtype)), name
    assert all(mean.dtype == torch.float32 for mean in load_weights(tmp_path / "step=6.ckpt").parameters())
    assert whole.losses["train/loss"] == pytest.approx(exact.losses["train/loss"], rel=0.02)
    assert whole.losses["train/loss"] != exact.losses["train/loss"]


@pytest.mark.slow
def test_a_later_stage_trains_float32_weights(folder: Path, tmp_path: Path) -> None:
    module = fit(folder, tmp_path, stages.STAGES, "bf16-true")
    assert {value.dtype for value in module.transformer.parameters()} == {torch.float32}  # type: ignore[union-attr]
    adapted = fit(folder, tmp_path / "lora", stages.STAGES, "bf16-true", lora=LoraOptions(rank=2))
    for name, value in adapted.transformer.named_parameters():  # type: ignore[union-attr]
        full = is_text_parameter(name) or ".lora_" in name or kept(name)
        assert value.dtype == (torch.float32 if full else torch.bfloat16), name


@pytest.mark.slow
def test_every_subcommand(in_tmp: Path, small_data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of test and predict are bfloat16, and the sampler's times are not."""
    seen: list[tuple[set[torch.dtype], torch.dtype | None]] = []
    forward = UniViGUTransformer3DModel.forward

    def spied(self: Any, latents: Any, timestep: Any, *args: Any, **options: Any) -> Any:
        assert timestep is None or timestep.dtype == torch.float32
        seen.append(({value.dtype for value in self.blocks[0].ffn.parameters()}, torch.get_default_dtype()))
        return forward(self, latents, timestep, *args, **options)

    monkeypatch.setattr(UniViGUTransformer3DModel, "forward", spied)
    common = ["--trainer.precision=bf16-true", "--trainer.enable_progress_bar=false"]
    quick = ["--model.sampling.caption_steps=1", "--model.sampling.num_inference_steps=1"]
    configs = ["--config=configs/recall.yaml", "--config=configs/frozen.yaml", *small_data, *common, *quick]
    small = ["--trainer.max_steps=2", "--media.every_n_steps=1", "--media.num_samples=1", "--report.num_samples=1"]
    UniViGUCLI(["fit", *configs, *small, "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"])
    UniViGUCLI(["test", *configs, "--trainer.limit_test_batches=1"])
    caption = ["--config=configs/generate.yaml", *small_data, *common, *quick, "--data.prompts=a red circle"]
    cli = UniViGUCLI(["predict", *caption, "--ckpt_path=runs/recall/checkpoints/last.ckpt"])
    assert cli.model.foundation.text_encoder.dtype == torch.bfloat16
    assert all(entry == ({torch.bfloat16}, torch.float32) for entry in seen) and len(seen) > 10


def test_other_precisions_are_refused(folder: Path) -> None:
    for precision in ("16-true", "64-true"):
        trainer = Trainer(accelerator="cpu", logger=False, precision=precision)  # type: ignore[arg-type]
        with pytest.raises(
            MisconfigurationException, match=f"trainer.precision='{precision}': expected 32-true, bf16-mixed"
        ):
            trainer.predict(UniViGU(str(folder)), DataLoader([0]))  # type: ignore[arg-type]
