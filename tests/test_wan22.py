"""Wan2.2: the folder of TI2V-5B is a foundation like any other, that of A14B is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from lightning import Trainer

from tests import tiny
from tests.tasks import Tasks
from univigu.checkpoint import export_pipeline, load_weights
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.options import LengthFilter
from univigu.data.shards import write_shard
from univigu.data.video import encode_mp4
from univigu.flow.objective import TaskMixture
from univigu.models.foundation import Foundation
from univigu.pipeline import UniViGUPipeline
from univigu.sampling.options import SamplingOptions
from univigu.training.module import UniViGU
from univigu.training.stages import Stage, StageSwitch

SIZE = {"height": 64, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan22")
    tiny.make_pipeline(wan22=True).save_pretrained(folder)
    config = folder / "vae" / "config.json"  # the real one has an entry that diffusers ignores
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clip_output": False}))
    return folder


def test_training_and_every_task(folder: Path, tmp_path: Path) -> None:
    """The text stream is trained on a frozen generator, whose videos stay WanPipeline's, bit for bit."""
    frames = torch.randint(0, 256, (5, 3, 64, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    texts = {"prompt": "a white circle", "caption": "it is white."}
    members = {"mp4": encode_mp4(frames), "json": json.dumps(texts).encode()}
    (tmp_path / "shards" / "train").mkdir(parents=True)
    write_shard(tmp_path / "shards" / "train" / "000000.tar", [(f"clip{i}", members) for i in range(2)])
    module = UniViGU(str(folder), seed=1)
    data = VideoTextDataModule(
        str(folder),
        shards=str(tmp_path / "shards"),
        **SIZE,
        prompt_length=16,
        batch_size=2,
        num_workers=0,
        length_filter=LengthFilter(min_caption=0),
    )
    tasks = TaskMixture(joint=1, understand=1, generate=0)
    stage = Stage(steps=2, target="caption", text_length=16, learning_rate=0.0, tasks=tasks)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[StageSwitch({"refine": stage})],
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2 and torch.isfinite(trainer.callback_metrics["train/loss"])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_pipeline(load_weights(tmp_path / "last.ckpt"), folder, tmp_path / "model")

    ours, wan = UniViGUPipeline.from_pretrained(tmp_path / "model"), WanPipeline.from_pretrained(folder)
    assert ours.config.expand_timesteps and ours.vae_scale_factor_spatial == 16
    made = []
    for pipe in (ours, wan):
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "max_sequence_length": 16, "output_type": "latent", **SIZE}
        embeds = {"prompt_embeds": torch.ones(1, 16, 32), "negative_prompt_embeds": torch.zeros(1, 16, 32)}
        made.append(pipe(**embeds, generator=torch.Generator().manual_seed(3), **options).frames)
    assert torch.equal(*made) and made[0].shape == (1, 48, 2, 4, 2)
    sampler = Tasks(ours.transformer, ours.scheduler, SamplingOptions(num_inference_steps=2, guidance_scale=5.0))
    inputs = embeds["prompt_embeds"], embeds["negative_prompt_embeds"], made[0].shape[1:]
    sampled = sampler.generate(*inputs, torch.Generator().manual_seed(3)).latents  # with one time for all tokens
    torch.testing.assert_close(sampled, made[0], rtol=1e-5, atol=1e-5)

    read = {"caption_steps": 2, "max_sequence_length": 16}
    assert ours.caption(np.zeros((5, 64, 32, 3), np.uint8), **read).tokens.shape == (1, 16)
    joint = ours.joint("a white circle", **SIZE, num_inference_steps=2, max_sequence_length=16, joint_lag=1)
    assert joint.frames.shape == (1, 5, 64, 32, 3) and len(joint.text) == 1
    with pytest.raises(ValueError, match="width=48: expected a multiple of 32"):
        ours.joint("a white circle", 64, 48, 5)


def test_two_transformers_are_refused(folder: Path, tmp_path: Path) -> None:
    pipe = WanPipeline.from_pretrained(folder)
    both = WanPipeline(**(pipe.components | {"transformer_2": pipe.transformer}), boundary_ratio=0.875)
    both.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"foundation=.*two transformers \(Wan2.2 A14B\) are not supported"):
        Foundation(tmp_path)
    with pytest.raises(ValueError, match=r"transformer_2: two transformers"):
        UniViGUPipeline.from_pretrained(tmp_path)
