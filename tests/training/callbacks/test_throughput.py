"""Speed in the logs: rates against the clock, utilisation against the count of operations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from tests import tiny
from tests.training import test_stages as stages
from univigu.training.callbacks import StageSwitch, ThroughputLogger
from univigu.training.callbacks.throughput import workload
from univigu.training.module import UniViGU
from univigu.training.plan import step_flops


class Logged(Callback):
    """The last of the speeds that were logged, and what a step costs."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.work = workload(trainer, pl_module, batch)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        names = [name for name in trainer.callback_metrics if name.startswith("speed/")]
        self.speeds = {name[6:]: trainer.callback_metrics[name].item() for name in names}


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_speeds_agree_with_each_other(tmp_path: Path, share: float) -> None:
    refine = replace(stages.REFINE, text_share=share, full_text_from=1.0)
    tiny.make_pipeline().save_pretrained(tmp_path / "foundation")
    logged = Logged()
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[StageSwitch(stages.STAGES | {"refine": refine}), logged, ThroughputLogger(2, peak_flops=1e9)],
    )
    trainer.fit(UniViGU(str(tmp_path / "foundation")), DataLoader(stages.Clips(), batch_size=stages.BATCH))
    speeds, work = logged.speeds, logged.work
    assert set(speeds) == {
        "clips_per_second",
        "tokens_per_second",
        "seconds_per_step",
        "memory_gb",
        "data_wait_share",
        "utilisation",
    }
    assert work.video_tokens == 2 * 2 * 2 and work.stage is refine
    assert speeds["clips_per_second"] == pytest.approx(stages.BATCH / speeds["seconds_per_step"], rel=1e-4)
    assert speeds["tokens_per_second"] == pytest.approx(speeds["clips_per_second"] * (8 + 12 * share), rel=1e-4)
    used = step_flops(work, False) / (speeds["seconds_per_step"] * 1e9)
    assert speeds["utilisation"] == pytest.approx(used, rel=1e-3)
    assert speeds["seconds_per_step"] > 0 and 0 < speeds["data_wait_share"] < 1
    assert 0.1 < speeds["memory_gb"] < 50


@pytest.mark.parametrize("option", [{"every_n_steps": 1}, {"peak_flops": 0.0}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=name):
        ThroughputLogger(**option)
