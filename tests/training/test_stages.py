"""Stages, and the callback that puts them in force in a real training."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset

from tests import tiny
from univigu.data import sources as encode
from univigu.flow.objective import TaskMixture
from univigu.models.text import is_text_parameter
from univigu.training.module import UniViGU
from univigu.training.optim import OptimizerOptions
from univigu.training.stages import Stage, StageSwitch, select_stages

# ---------------------------------------------------------------------- one stage


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("target", "title"),
        ("text_length", 1),
        ("text_share", 0.0),
        ("text_share", 1.5),
        ("text_time_power", 0.0),
        ("warmup_steps", -1),
        ("learning_rate", -1e-4),
        ("text_learning_rate", math.nan),
    ],
)
def test_an_option_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"stage: {field}={value!r}: expected"):
        Stage(**{field: value})


def test_a_stage_in_which_nothing_learns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learning_rate=0\.0"):
        Stage(learning_rate=0.0, text_learning_rate=0.0)
    with pytest.raises(ValueError, match=r"tasks=.*generate share"):
        Stage(learning_rate=0.0, tasks=TaskMixture(joint=1, understand=1, generate=1))
    assert Stage(learning_rate=0.0, tasks=TaskMixture(joint=1, understand=1, generate=0)).learning_rate == 0


def test_learning_rate_rises_and_falls() -> None:
    stage = Stage(steps=110, warmup_steps=10)
    factors = [stage.learning_rate_factor(step) for step in range(stage.steps + 1)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.51)  # half way down the cosine
    assert factors[110] == pytest.approx(0.02) and stage.learning_rate_factor(999) == pytest.approx(0.02)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[35] == pytest.approx(0.02 + 0.98 * (1 + math.cos(math.pi / 4)) / 2)


def test_all_positions_are_used_from_some_step_on() -> None:
    stage = Stage(steps=10, text_share=0.25)
    assert [stage.text_share_at(step) for step in range(10)] == [0.25] * 6 + [1.0] * 4
    assert Stage().text_share_at(0) == 1.0


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert Stage(steps=1, warmup_steps=0).learning_rate_factor(0) == 1.0


# ---------------------------------------------------------------------- their order


def test_steps_are_located_at_the_borders() -> None:
    switch = StageSwitch({"a": Stage(steps=2), "b": Stage(steps=1), "c": Stage(steps=3)})
    assert [switch.locate(step) for step in range(6)] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert switch.locate(6) == switch.locate(100) == (2, 2)


def test_the_stages_of_a_run_are_selected_in_order() -> None:
    stages = {"refine": Stage(steps=3), "recall": Stage(steps=2), "mine": Stage(steps=1)}
    assert [*select_stages(stages, ["mine", "recall"])] == ["mine", "recall"]
    for run, message in (
        ([], r"run=\[\]"),
        (["polish"], r"stages\.polish is not configured"),
        (["recall"], r"stages\.mine: no such stage"),  # shipped stages may be configured by an overlay
    ):
        with pytest.raises(ValueError, match=message):
            select_stages(stages, run)


def test_rates_come_from_the_stage_or_the_optimizer() -> None:
    options = OptimizerOptions(learning_rate=1e-5, text_learning_rate=1e-4)
    assert options.rates(Stage()) == {"video": 1e-5, "text": 1e-4}
    assert options.rates(Stage(learning_rate=0.0, tasks=TaskMixture(1, 1, 0))) == {"video": 0.0, "text": 1e-4}
    assert options.rates(Stage(text_learning_rate=0.5)) == {"video": 1e-5, "text": 0.5}


# ---------------------------------------------------------------------- a real training

BATCH, EPOCH = 4, 3
RECALL = Stage(
    steps=2,
    target="prompt",
    text_length=8,
    learning_rate=0.0,
    text_learning_rate=1e-3,
    warmup_steps=2,
    tasks=TaskMixture(joint=1, understand=1, generate=0),
)
REFINE = Stage(
    steps=4,
    target="caption",
    text_length=12,
    learning_rate=1e-3,
    text_learning_rate=2e-3,
    warmup_steps=0,
    text_share=0.5,
    teacher_weight=0.0,
)
STAGES = {"recall": RECALL, "refine": REFINE}
ADAMW = OptimizerOptions(name="adamw")


class Clips(Dataset):
    """Random latents, prompts and captions, as the loaders give them."""

    def __len__(self) -> int:
        return BATCH * EPOCH

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        texts = {
            name: torch.cat([torch.randint(3, 100, (length - 2,), generator=generator), torch.tensor([1, 0])])
            for name, length in (("prompt_ids", 8), ("caption_ids", 12))
        }
        return {"key": str(index), "latents": torch.randn(tiny.CHANNELS, 2, 4, 4, generator=generator), **texts}


class Diary(Callback):
    """What was in force at every step, and the weights after it."""

    def __init__(self) -> None:
        self.pages: dict[int, SimpleNamespace] = {}
        self.shown: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        def watch(module: Any, args: tuple[Any, ...]) -> None:
            if len(args) > 3:
                self.shown.append(args[3].tokens.shape[1])

        self.shown, self.hook = [], pl_module.transformer.register_forward_pre_hook(watch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.hook.remove()
        self.pages[trainer.global_step - 1] = SimpleNamespace(
            stage="recall" if pl_module.stage is RECALL else "refine",
            shown=set(self.shown),
            loss=outputs["loss"].item(),
            rates={group["name"].removesuffix("_matrix"): group["lr"] for group in trainer.optimizers[0].param_groups},
            target=pl_module.prepare(batch).text_ids,
            batch=batch,
            weights={name: value.clone() for name, value in pl_module.transformer.state_dict().items()},
        )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foundation")
    tiny.make_pipeline().save_pretrained(path)
    return path


def make_trainer(root: Path, callbacks: list[Callback], **options: Any) -> Trainer:
    """A trainer on the CPU that prints and logs nothing."""
    return Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )


def train(
    folder: Path, root: Path, stages: dict[str, Stage], ckpt_path: Path | None = None, **options: Any
) -> tuple[Diary, Trainer, UniViGU]:
    diary, module = Diary(), UniViGU(str(folder), optimizer=ADAMW, seed=3)
    saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = make_trainer(root, [StageSwitch(stages), diary, saver], **options)
    loader: DataLoader = DataLoader(Clips(), batch_size=BATCH)
    trainer.fit(module, loader, ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=True)
    return diary, trainer, module


@pytest.fixture(scope="session")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An uninterrupted run through both stages, two epochs of three batches; its checkpoints are in ``root``."""
    root = tmp_path_factory.mktemp("run")
    start = UniViGU(str(folder), seed=3)
    start.configure_model()
    assert start.transformer is not None
    diary, trainer, _ = train(folder, root, STAGES)
    return SimpleNamespace(root=root, pages=diary.pages, trainer=trainer, start=start.transformer.state_dict())


def test_stages_follow_each_other_at_the_right_step(trained: SimpleNamespace) -> None:
    assert [page.stage for page in trained.pages.values()] == ["recall"] * 2 + ["refine"] * 4
    assert list(trained.pages) == list(range(6)) and trained.trainer.global_step == 6
    assert all(math.isfinite(page.loss) for page in trained.pages.values())


def test_the_target_text_switches(trained: SimpleNamespace) -> None:
    for page in trained.pages.values():
        name = "prompt_ids" if page.stage == "recall" else "caption_ids"
        assert torch.equal(page.target, page.batch[name])


def test_a_share_of_the_text_is_shown_in_the_first_steps_of_its_stage(trained: SimpleNamespace) -> None:
    assert [page.shown for page in trained.pages.values()] == [{8}, {8}, {6}, {6}, {6}, {12}]


def test_learning_rates_follow_the_stages(trained: SimpleNamespace) -> None:
    for step, page in trained.pages.items():
        stage, within = (RECALL, step) if step < 2 else (REFINE, step - 2)
        factor = stage.learning_rate_factor(within)
        assert page.rates == {"video": stage.learning_rate * factor, "text": stage.text_learning_rate * factor}
    assert trained.pages[0].rates["text"] == RECALL.text_learning_rate / 2


def test_frozen_weights_rest_until_their_stage(trained: SimpleNamespace) -> None:
    before = trained.start
    for step, page in trained.pages.items():
        changed = {name for name, value in page.weights.items() if not torch.equal(value, before[name])}
        video = {name for name in changed if not is_text_parameter(name)}
        assert "text_head.linear.weight" in changed
        assert (len(video) > 0) == (step >= 2), step
        if step == 2:
            assert {"patch_embedding.weight", "blocks.1.ffn.net.2.weight", "proj_out.bias"} <= video
        before = page.weights


def test_resuming_in_the_second_stage_continues_exactly(trained: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    diary, trainer, _ = train(folder, tmp_path, STAGES, trained.root / "step=3.ckpt")
    assert list(diary.pages) == [3, 4, 5] and trainer.global_step == 6
    for step, page in diary.pages.items():
        whole = trained.pages[step]
        assert (page.stage, page.loss, page.rates) == (whole.stage, whole.loss, whole.rates)
        assert page.shown == whole.shown
        assert page.batch["key"] == whole.batch["key"]
        assert all(torch.equal(value, whole.weights[name]) for name, value in page.weights.items())


@pytest.mark.parametrize(
    "stages", [{"recall": RECALL}, STAGES | {"recall": replace(RECALL, steps=3)}, {"recall": RECALL, "polish": REFINE}]
)
def test_resuming_with_other_stages_is_refused(
    trained: SimpleNamespace, folder: Path, tmp_path: Path, stages: dict[str, Stage]
) -> None:
    with pytest.raises(MisconfigurationException, match=r"made with stages .*'recall', 2.*'refine', 4.*init_from"):
        train(folder, tmp_path, stages, trained.root / "step=3.ckpt")


def test_what_a_checkpoint_says_of_its_stages(trained: SimpleNamespace) -> None:
    saved = torch.load(trained.root / "step=3.ckpt", weights_only=True)
    (state,) = [value for name, value in saved["callbacks"].items() if "StageSwitch" in name]
    assert state == {"index": 1, "stages": [{"name": name, **asdict(stage)} for name, stage in STAGES.items()]}


@pytest.mark.parametrize("large", [False, True])
def test_a_generator_alone_sees_captions_and_prompts_in_several_slots(
    large: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(encode.LARGE, "text_encoder", 0 if large else 2**31)
    slots: list[int] = []

    class Watch(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            embedder = pl_module.transformer.condition_embedder.text_embedder
            embedder.register_forward_pre_hook(lambda module, args: slots.append(args[0].shape[1]))

    class Captioned(Clips):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), "caption": "a circle"}

    alone = Stage(steps=18, tasks=TaskMixture(0, 0, 1), text_learning_rate=0.0, teacher_weight=0.0)
    module = UniViGU(str(folder), optimizer=ADAMW, seed=3)
    trainer = make_trainer(tmp_path, [StageSwitch({"foundation": alone}), Watch()], enable_checkpointing=False)
    trainer.fit(module, DataLoader(Captioned(), batch_size=BATCH))
    assert set(slots) == {8, 128, 512} | (set() if large else {12})  # the prompt's three slots and the caption's


def test_max_steps_can_only_shorten(folder: Path, tmp_path: Path) -> None:
    diary, _, _ = train(folder, tmp_path, STAGES, max_steps=1)
    assert list(diary.pages) == [0]


def test_outside_training_the_last_stage_is_meant(folder: Path) -> None:
    module = UniViGU(str(folder))
    StageSwitch(STAGES).setup(Trainer(accelerator="cpu", logger=False), module, "predict")
    assert module.stage is REFINE


def test_a_random_start_has_the_foundations_size_and_not_its_weights(folder: Path) -> None:
    sizes, weights = [], []
    for init_from in (None, "random"):
        module = UniViGU(str(folder), init_from=init_from, seed=3)
        module.configure_model()
        state = module.transformer.state_dict()
        sizes.append({name: tuple(value.shape) for name, value in state.items()})
        weights.append(state["blocks.0.attn1.to_q.weight"])
    assert sizes[0] == sizes[1]
    assert not torch.equal(*weights)
