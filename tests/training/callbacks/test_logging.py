"""What a training run leaves in TensorBoard: scalars, captions as text, videos as moving pictures."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch.utils.data import DataLoader

from tests import tiny
from tests.conftest import REPO
from tests.training import test_stages as stages
from univigu.cli import main
from univigu.training.callbacks.checkpoint import LastCheckpoint
from univigu.training.callbacks.held_out import FinalReport, HeldOutCallback, MediaLogger, log_video, markdown_table
from univigu.training.callbacks.monitor import TrainingMonitor
from univigu.training.module import UniViGU
from univigu.training.stages import StageSwitch

CALLBACKS = """
stages: {recall: {steps: 3, warmup_steps: 1}}
media: {every_n_steps: 2, num_samples: 3}
report: {num_samples: 3}
"""


def fit(folder: Path, *args: str) -> None:
    """A run of three steps."""
    (folder / "callbacks.yaml").write_text(CALLBACKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(
            [
                "fit",
                f"--config={REPO}/configs/recall.yaml",
                "--config=callbacks.yaml",
                "--model.sampling.num_inference_steps=2",
                "--model.sampling.caption_steps=2",
                "--trainer.log_every_n_steps=1",
                "--trainer.enable_checkpointing=false",
                *args,
            ]
        )


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "runs/recall/tensorboard/version_0"), {"images": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_data: list[str]) -> tuple[EventAccumulator, str]:
    """The events and the printed end of a run with validation and media."""
    printed, folder = io.StringIO(), tmp_path_factory.mktemp("logged")
    with redirect_stdout(printed):
        fit(folder, *small_data, "--trainer.val_check_interval=2")
    return events_of(folder), printed.getvalue()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, small_data: list[str]) -> list[float]:
    """The losses of the same run without them."""
    folder = tmp_path_factory.mktemp("quiet")
    fit(folder, *small_data, "--media.every_n_steps=0", "--trainer.limit_val_batches=0")
    return [event.value for event in events_of(folder).Scalars("train/loss")]


@pytest.mark.slow
def test_scalars(run: tuple[EventAccumulator, str]) -> None:
    tags = set(run[0].Tags()["scalars"])
    assert {
        "train/loss",
        "train/video_loss",
        "train/text_loss",
        "train/grad_norm",
        "val/text_loss",
        "val/video_loss",
        "lr/video",
        "lr/text",
        "data/epoch/samples",
    } <= tags
    assert any(tag.startswith("train/text_loss_t0.") for tag in tags)
    assert any(tag.startswith("train/video_loss_t0.") for tag in tags)
    assert run[0].Scalars("data/epoch/samples")[0].value == 8
    # A first prediction of uniform logits costs log V a masked token; the mean is over half of them, roughly.
    assert 0 < run[0].Scalars("train/text_loss")[0].value < 10


def test_captions_are_logged_beside_the_truth(run: tuple[EventAccumulator, str]) -> None:
    (event,) = run[0].Tensors("held_out/captions/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 2
    assert text.count("\n") == 4 and "| truth | model |" in text and "background" in text


def test_videos_are_logged_as_moving_pictures(run: tuple[EventAccumulator, str]) -> None:
    (event,) = run[0].Images("held_out/clips")
    assert Image.open(io.BytesIO(event.encoded_image_string)).n_frames == 9  # type: ignore[attr-defined]
    (event,) = run[0].Images("held_out/generated")
    image = Image.open(io.BytesIO(event.encoded_image_string))
    assert image.format == "GIF" and image.n_frames == 9
    assert image.size == (3 * 64 * 2, 64 * 2) == (event.width, event.height)


def test_the_end_shows_captions_and_where_to_look(run: tuple[EventAccumulator, str]) -> None:
    assert "held-out clips" in run[1] and "truth" in run[1]
    assert "accuracy over 3 held-out clips" in run[1]
    assert "tensorboard --logdir runs/recall" in run[1]


@pytest.mark.slow
def test_sampling_leaves_training_alone(run: tuple[EventAccumulator, str], quiet: list[float]) -> None:
    """The losses with media, reports and validation are those without."""
    assert len(quiet) == 3
    assert [event.value for event in run[0].Scalars("train/loss")] == quiet


def test_csv_gets_every_scalar(
    tmp_path: Path, small_data: list[str], run: tuple[EventAccumulator, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same values as TensorBoard; no time is spent on samples that it cannot store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MediaLogger, "samples", None)
        fit(tmp_path, *small_data, "--trainer.val_check_interval=2", "--trainer.logger=CSVLogger")
    (path,) = (tmp_path / "runs/recall").rglob("metrics.csv")
    assert not list(tmp_path.rglob("*tfevents*")) and (path.parent / "config.yaml").is_file()
    with path.open() as file:
        rows = list(csv.DictReader(file))
    tags = set(run[0].Tags()["scalars"])
    assert tags - {"hp_metric"} <= rows[0].keys()
    for tag in ("train/loss", "val/text_loss", "lr/text", "data/epoch/samples"):
        values = [float(row[tag]) for row in rows if row[tag]]
        assert values == pytest.approx([event.value for event in run[0].Scalars(tag)], rel=1e-5), tag
    printed = capsys.readouterr().out
    assert f"curves, captions, videos: {path.parent.relative_to(tmp_path)}" in printed


def test_wandb_gets_scalars_texts_and_videos(
    tmp_path: Path, small_data: list[str], run: tuple[EventAccumulator, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (120 MB); pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit(tmp_path, *small_data, "--trainer.val_check_interval=2", "--trainer.logger=WandbLogger")
    wandb.finish()
    (folder,) = (tmp_path / "runs/recall/wandb").glob("offline-run-*")
    (gif,) = folder.glob("files/media/videos/held_out/clips_*.gif")
    picture = Image.open(gif)
    assert picture.n_frames == 9 and picture.size == (3 * 64 * 2, 64 * 2)  # type: ignore[attr-defined]
    (file,) = folder.glob("files/media/table/held_out/captions_*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["clip", "truth", "model"] and len(table["data"]) == 3
    (log,) = folder.glob("*.wandb")
    stored = log.read_bytes()
    for tag in ("train/loss", "val/text_loss", "lr/text", "data/epoch/samples", "held_out/generated"):
        assert tag.encode() in stored, tag


def test_a_logger_that_is_not_installed_is_named(
    in_tmp: Path, small_data: list[str], failing: Callable[[list[str]], str]
) -> None:
    """In one line."""
    logger = f"--trainer.logger={__name__}.Missing"
    printed = failing(["fit", "--config=recall.yaml", *small_data, logger])
    assert f"error: class_path '{__name__}.Missing':; no package 'wandb'\n" in printed


class Missing(CSVLogger):
    def __init__(self, save_dir: str = ".") -> None:
        raise ModuleNotFoundError("no package 'wandb'")


def test_a_report_that_fails_costs_no_training(
    in_tmp: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(FinalReport):
        def samples(self, trainer: Trainer) -> Any:
            return {"key": ["a"]}

    fit_tiny([StageSwitch({"recall": stages.RECALL}), Failing(), LastCheckpoint()])
    assert torch.load("checkpoints/last.ckpt", weights_only=True)["global_step"] == stages.RECALL.steps
    assert "could not be captioned; the training itself is complete" in caplog.text
    printed = capsys.readouterr().out  # before the checkpoint is written
    assert re.search("checkpoint: .*last.ckpt", printed), printed


@pytest.mark.slow
def test_held_out_clips_are_looked_at_once_a_step(in_tmp: Path) -> None:
    """Also where a step takes several batches."""

    class Look(HeldOutCallback):
        steps: ClassVar[list[int]] = []

        def evaluate(self, trainer: Trainer, pl_module: Any) -> None:
            self.steps.append(trainer.global_step)

    trainer = fit_tiny([StageSwitch({"refine": stages.REFINE}), Look(2, 1)], accumulate_grad_batches=3)
    assert trainer.global_step == stages.REFINE.steps == 4 and Look.steps == [2, 4]


class CountingLoader(DataLoader):
    """Measures how long training waited for it, as TrainLoader does."""

    waited = 0.0

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            self.waited += 0.01
            yield batch


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_throughput_is_consistent(in_tmp: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates agree with each other; other callbacks' time is no waiting for data."""
    monkeypatch.setattr("univigu.training.stages.FULL_TEXT_FROM", 1.0)

    class Busy(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            time.sleep(0.1)

    refine = replace(stages.REFINE, text_share=share)
    callbacks = [StageSwitch({"refine": refine}), TrainingMonitor(2), Busy()]
    trainer = fit_tiny(callbacks, CountingLoader, logger=CSVLogger("."), log_every_n_steps=1)
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("throughput/")}
    speeds = {name.removeprefix("throughput/"): value for name, value in values.items()}
    seconds = speeds.pop("seconds_per_batch")
    assert seconds > 0 and 0.1 < speeds.pop("memory_gb") < 50
    assert speeds.pop("data_wait_share") == pytest.approx(0.01 / seconds, rel=1e-3)
    clips = stages.BATCH / seconds
    assert speeds.pop("samples_per_second") == pytest.approx(clips, rel=1e-3)
    assert speeds.pop("tokens_per_second") == pytest.approx(clips * (8 + 12 * share), rel=1e-3)
    assert not speeds


def fit_tiny(callbacks: list[Callback], loader: Any = DataLoader, **options: Any) -> Trainer:
    tiny.make_pipeline().save_pretrained("foundation")
    trainer = Trainer(
        default_root_dir=".",
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **({"logger": False} | options),
    )
    trainer.fit(UniViGU("foundation"), loader(stages.Clips(), batch_size=stages.BATCH))
    return trainer


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0"):
        TrainingMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match="num_samples=0"):
        MediaLogger(num_samples=0)


def test_the_table_of_captions_has_a_row_for_each_clip() -> None:
    """As TensorBoard shows it, whatever the texts contain."""
    truth, captions = (
        ["One paragraph.\n\nAnother one.\n", "left | right"],
        ["Windows\r\nlines\u2028too", "| a |\n|---|"],
    )
    texts = list(zip(["0", "a|b"], truth, captions, strict=True))
    page = markdown_to_safe_html(markdown_table(["clip", "truth", "model"], texts))
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)]
    assert [[unescape(cell) for cell in row] for row in rows[1:]] == [
        ["0", "One paragraph. Another one.", "Windows lines too"],
        ["a|b", "left | right", "| a | |---|"],
    ]


def test_frames_stay_what_they_are(tmp_path: Path) -> None:
    """A logged clip holds its frames in order, each side by side with the others' of its time."""

    frames = torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8)
    for i in range(3):
        frames[0, i], frames[1, i] = 60 * i, 255 - 60 * i
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    log_video([logger], "clip", frames, 0)
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    image = Image.open(io.BytesIO(events.Images("clip")[0].encoded_image_string))
    for i in range(3):
        image.seek(i)
        picture = image.convert("L")
        assert abs(picture.getpixel((6, 6)) - 60 * i) < 4 and abs(picture.getpixel((22, 6)) - (255 - 60 * i)) < 4
