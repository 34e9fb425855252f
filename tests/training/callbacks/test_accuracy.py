"""Learning curves of held-out captions, and the three conditions they are measured under."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from univigu.cli import main
from univigu.shapes.scenes import sample_scene
from univigu.shapes.texts import prompt_of
from univigu.training.callbacks import CaptionAccuracy
from univigu.training.module import UniViGU

CALLBACKS = """
stages: {recall: {steps: 4}}
trainer:
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: runs, name: csv, version: ""}
  callbacks:
    - class_path: univigu.training.callbacks.CaptionAccuracy
      init_args: {every_n_steps: 2, num_clips: 4}
"""


def test_curves_are_logged_at_their_steps(in_tmp: Path, small_data: list[str]) -> None:
    Path("callbacks.yaml").write_text(CALLBACKS)
    main(
        [
            "fit",
            "--config=configs/recall.yaml",
            "--config=callbacks.yaml",
            *small_data,
            "--model.sampling.caption_steps=2",
            "--trainer.enable_checkpointing=false",
        ]
    )
    with Path("runs/csv/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/caption/mean")]
    assert [int(row["step"]) for row in rows] == [2, 4]
    for row in rows:
        for name in ("caption/mean", "caption/shape", "caption_with_prompt/mean", "caption_with_other_prompt/mean"):
            assert 0 <= float(row[f"val/{name}"]) <= 1


class Copier(UniViGU):
    """A captioner that repeats its condition and writes nothing without one."""

    def latents_of(self, samples: dict[str, Any]) -> torch.Tensor:
        return torch.zeros(len(samples["key"]), 1)

    @property
    def tasks(self) -> Any:
        return SimpleNamespace(generators=list, sample=self.sample, texts=list)

    def sample(
        self, task: str, prompts: list[str] | None, length: int, latents: torch.Tensor, generator: list[int]
    ) -> list[str]:
        assert task == "caption" and len(latents) == len(generator) <= 16
        return prompts or [""] * len(latents)


def test_copying_shows() -> None:
    """The measure itself, on a captioner that can only copy: perfect, wrong with another's prompt, mute without."""
    scenes = [sample_scene(seed, "val") for seed in range(8)]
    callback = CaptionAccuracy(num_clips=8)
    callback._samples = {
        "key": [str(i) for i in range(8)],
        "prompt": [prompt_of(scene) for scene in scenes],
        "scene": [scene.to_dict() for scene in scenes],
        "prompt_ids": torch.zeros(8, 32),
    }
    results: dict[str, float] = {}
    logger = SimpleNamespace(log_metrics=lambda metrics, step: results.update(metrics))
    callback.evaluate(SimpleNamespace(loggers=[logger], global_step=1), Copier())  # type: ignore[arg-type]
    assert results["val/caption/mean"] == 0
    assert results["val/caption_with_prompt/mean"] == 1
    assert 0 < results["val/caption_with_other_prompt/mean"] < 0.6


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="num_clips=1"):
        CaptionAccuracy(num_clips=1)
