"""``test`` and ``validate`` on a data set that is not the embedded world, by one process and by two."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests import tiny
from tests.conftest import REPO, run_ranks
from tests.tiny_clip import write_clip, write_detector
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.options import LengthFilter
from univigu.data.shards import write_shard
from univigu.data.video import encode_mp4
from univigu.evaluation.held_out import EvaluationOptions, own_samples
from univigu.flow.objective import TaskMixture
from univigu.sampling.options import SamplingOptions
from univigu.training.module import UniViGU
from univigu.training.stages import Stage, StageSwitch

COLORS = ["red", "green", "blue", "white", "black"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny foundation, a tiny CLIP, a tiny detector, and five sound samples and a broken one without scenes."""
    folder = tmp_path_factory.mktemp("evaluation")
    pipeline = tiny.make_pipeline()
    pipeline.save_pretrained(folder / "foundation")
    tiny.make_unified(pipeline.transformer, len(pipeline.tokenizer)).save_pretrained(folder / "unified")
    write_clip(folder / "clip")
    write_detector(folder / "detector.pt")
    samples = []
    for i, color in enumerate(COLORS):
        frames = torch.randint(0, 256, (9, 3, 64, 64), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        texts = {"prompt": f"a large {color} circle moving left", "caption": f"A {color} circle moves. It is large."}
        key = f"clip{i}" if i else os.fsdecode(b"caf\xe9")  # a file's name need not be UTF-8
        samples.append((key, {"mp4": encode_mp4(frames), "json": json.dumps(texts).encode()}))
        if i == 2:
            samples.append(("broken", {"mp4": b"no video", "json": json.dumps(texts).encode()}))
    for split in ("val", "test"):
        (folder / "shards" / split).mkdir(parents=True)
        write_shard(folder / "shards" / split / "000000.tar", samples)
    return folder


STAGE = Stage(steps=1, text_length=16)


def evaluate(
    folder: Path,
    run: str = "test",
    batch_size: int = 2,
    data: dict[str, Any] | None = None,
    stage: Stage = STAGE,
    options: dict[str, Any] | None = None,
    callbacks: tuple[Callback, ...] = (),
    seed: int = 1,
    **trainer: Any,
) -> dict[str, float]:
    """The figures of a model with random weights.

    Args:
        data: options of the data module in place of those for the five samples on the fly.
        options: of the evaluation, in place of those that measure everything.
        trainer: devices and strategy.
    """
    torch.set_num_threads(1)
    everything = {"clip": str(folder / "clip"), "video_features": f"trusted:{folder / 'detector.pt'}"}
    evaluation = EvaluationOptions(**(everything if options is None else options))
    module = UniViGU(
        str(folder / "foundation"),
        str(folder / "unified"),
        evaluation=evaluation,
        seed=seed,
        sampling=SamplingOptions(num_inference_steps=2, caption_steps=2),
    )
    five = {"shards": str(folder / "shards"), "height": 32, "width": 32, "num_frames": 5, "precompute": False}
    loaded = VideoTextDataModule(
        str(folder / "foundation"),
        batch_size=batch_size,
        num_workers=0,
        prompt_length=32,
        length_filter=LengthFilter(min_caption=0),
        **(five | (data or {})),
    )
    driver = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
        callbacks=[StageSwitch({"mine": stage}), *callbacks],
        **trainer,
    )
    getattr(driver, run)(module, datamodule=loaded, verbose=False)
    assert not any("evaluation" in name for name in module.state_dict())  # nothing of it reaches checkpoints
    return {name: float(value) for name, value in driver.callback_metrics.items()}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, float]:
    return evaluate(folder, batch_size=1, devices=1)


NAMES = [
    *(
        f"caption/{name}"
        for name in (
            "bleu4",
            "rouge_l",
            "cider",
            "words",
            "words_truth",
            "repetition",
            "distinct_1",
            "distinct_2",
            "unique",
            "tokens",
            "clip",
        )
    ),
    "vae/psnr",
    "vae/ssim",
    "generate/clip",
    "generate/fvd",
    "joint/clip",
    "joint/fvd",
    "flow/loss",
    "flow/foundation",
    "flow/ratio",
]


@pytest.mark.slow
def test_all_is_measured_that_needs_no_scene(alone: dict[str, float]) -> None:
    assert sorted(alone) == sorted(f"test/{name}" for name in NAMES)
    assert all(torch.tensor(value).isfinite() for value in alone.values())
    assert alone["test/caption/words_truth"] == 6.0  # the prompts', five clips' each
    assert 3 < alone["test/vae/psnr"] < 40 and 0 < alone["test/caption/words"] <= 256
    assert alone["test/generate/fvd"] > 0 and alone["test/flow/ratio"] == pytest.approx(1)


@pytest.mark.slow
def test_validation_measures_the_same(folder: Path, alone: dict[str, float]) -> None:
    found = evaluate(folder, "validate", batch_size=1, devices=1)
    assert found["val/text_loss"] > 0
    assert {name for name in found if "/" in name.removeprefix("val/")} == {f"val/{name}" for name in NAMES}
    for name in NAMES:
        assert found[f"val/{name}"] == pytest.approx(alone[f"test/{name}"], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("batch_size,tolerance", [(1, 1e-6), (2, 5e-3)], ids=["batches of one", "other batches"])
def test_two_processes_measure_as_one(
    folder: Path, alone: dict[str, float], tmp_path: Path, batch_size: int, tolerance: float
) -> None:
    """Six samples, one of them broken: with batches of one a process gets another sample in its place, once more.

    Batched otherwise a sample comes out with other rounding errors, which can turn a pixel or a word.
    """
    run_ranks(evaluate_share, folder, tmp_path, batch_size)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == pytest.approx(alone, rel=tolerance, abs=1e-6)


def evaluate_share(folder: Path, output: Path, batch_size: int) -> None:
    found = evaluate(folder, batch_size=batch_size, devices=2, strategy="ddp")
    (output / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_another_seed_draws_other_noise_for_the_same_clips(folder: Path, alone: dict[str, float]) -> None:
    other = evaluate(folder, options={"generation": False}, seed=2)
    assert alone["test/flow/loss"] != other["test/flow/loss"] == pytest.approx(alone["test/flow/loss"], rel=0.2)
    assert other["test/vae/psnr"] == pytest.approx(alone["test/vae/psnr"])


def test_samples_that_are_repeated_count_once() -> None:
    batch = {"number": [1, 3, 3, 4], "key": list("abcd"), "latents": torch.arange(4), "null_embeds": torch.ones(1, 2)}
    seen: set[int] = set()
    first = own_samples(batch, {1, 3}, seen)
    assert first is not None and first["key"] == ["a", "b"] and first["latents"].tolist() == [0, 1]
    assert first["null_embeds"].shape == (1, 2)
    assert own_samples(batch, {1, 3}, seen) is None and seen == {1, 3}
    other = own_samples(batch, {2, 4}, set())
    assert other is not None and other["key"] == ["d"]
    whole = own_samples(batch, None, set())  # a loader of one's own
    assert whole is not None and whole["key"] == list("abcd")


class Begun(Callback):
    """Counts the batches that an evaluation has begun, and is done with."""

    def __init__(self) -> None:
        self.begun = self.done = 0

    def on_test_batch_start(self, *_: Any) -> None:
        self.begun += 1

    def on_test_batch_end(self, *_: Any) -> None:
        self.done += 1


@pytest.mark.parametrize("option", ["clip", "video_features"])
def test_what_needs_the_videos_is_refused_before_anything_is_drawn(folder: Path, option: str) -> None:
    trusted = "trusted:" if option == "video_features" else ""
    batches, models = Begun(), {"clip": "clip", "video_features": "detector.pt"}
    asked = {
        "data": {"precompute": True},
        "options": {option: trusted + str(folder / models[option])},
        "callbacks": (batches,),
    }
    message = rf"model\.evaluation\.{option}='.*{models[option]}': .*videos.*--data.precompute false"
    with pytest.raises(MisconfigurationException, match=message):
        evaluate(folder, devices=1, **asked)
    assert batches.begun == 0
    # Shards that hold latents alone, with nothing to precompute: the first batch tells.
    latents = next(path for path in (folder / "shards").glob("latents-*") if path.is_dir())
    asked["data"] = {"shards": str(latents)}
    with pytest.raises(MisconfigurationException, match=message):
        evaluate(folder, devices=1, **asked)
    assert (batches.begun, batches.done) == (1, 0)


def test_latents_are_enough_for_what_is_made(folder: Path) -> None:
    """A stage without text has no captions to compare with the videos; made ones are scored all the same."""
    stage = Stage(steps=1, text_length=16, tasks=TaskMixture(joint=0, understand=0, generate=1))
    options, data = {"clip": str(folder / "clip")}, {"precompute": True}
    found = evaluate(folder, devices=1, stage=stage, options=options, data=data)
    assert "test/generate/clip" in found and not any(name.startswith("test/caption") for name in found)


@pytest.mark.slow
def test_the_page_lists_every_name(folder: Path, alone: dict[str, float]) -> None:
    """Those of clips without scenes, and those of the embedded world's, which have properties besides."""
    world = {"shards": None, "root": str(folder / "world"), "num_val_clips": 6, "height": 64, "width": 64}
    longer = Stage(steps=1, text_length=32)
    found = evaluate(folder, devices=1, batch_size=6, data=world | {"num_frames": 9}, stage=longer)
    assert {f"test/{name}" for name in ("caption/exact_text", "caption/shape", "generate/color")} <= found.keys()
    logged = {name.removeprefix("test/") for name in (*alone, *found)}
    page = (REPO / "docs" / "EVALUATION.md").read_text()
    table = page.partition("| name | metric | of |")[2].partition("\n\n")[0]
    attributes = re.findall("`(\\w+)`", page.partition("`ATTRIBUTE` is ")[2].partition("\n\n")[0])
    cells = [re.findall("`([^`]+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("|")]
    single = {name for names in cells for name in names if not re.search("ATTRIBUTE|KIND", name)}
    patterns = {name for names in cells for name in names if "ATTRIBUTE" in name}
    listed = single | {pattern.replace("ATTRIBUTE", name) for pattern in patterns for name in attributes}
    assert logged <= listed, sorted(logged - listed)
    assert single <= logged, sorted(single - logged)
