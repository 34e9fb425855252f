"""Adapters on the shared attention: nothing at first, merged into plain weights, trained alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, default_collate

from tests import tiny
from tests.models import test_transformer as formulas
from tests.training import test_stages as stages
from univigu.checkpoint import load_weights
from univigu.evaluation.held_out import EvaluationOptions
from univigu.flow.objective import TaskMixture
from univigu.models.lora import LoraOptions, add_lora, is_lora_parameter, merge_lora
from univigu.models.options import ArchitectureOptions
from univigu.models.text import is_text_parameter
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.training.module import UniViGU
from univigu.training.optim import OptimizerOptions, freeze_by_rate, group_of, trained_and_frozen
from univigu.training.stages import Stage, StageSwitch

VOCAB = 11

ADAMW = OptimizerOptions(name="adamw")


@pytest.fixture
def model() -> UniViGUTransformer3DModel:
    return tiny.make_unified(tiny.make_wan(), VOCAB)


def test_adapters_start_at_nothing_and_merge(model: UniViGUTransformer3DModel) -> None:
    inputs, options = formulas.make_inputs(), LoraOptions(rank=3, alpha=6)
    before, names = formulas.run(model, inputs), set(model.state_dict())
    add_lora(model, options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    adapted = formulas.run(model, inputs)
    formulas.assert_close(adapted.sample, before.sample)
    lora = {name: p for name, p in model.named_parameters() if is_lora_parameter(name)}
    assert len(lora) == 2 * 2 * 4 * 2  # layers, attentions, projections, matrices
    assert not any(is_text_parameter(name) for name in lora)
    tiny.shake(model, 0.2)
    changed = formulas.run(model, inputs)
    assert (changed.sample - before.sample).abs().max() > 1e-2
    merged = merge_lora(model.state_dict(), options)
    assert set(merged) == names
    plain = tiny.make_unified(tiny.make_wan(), VOCAB)
    plain.load_state_dict(merged)
    after = formulas.run(plain, inputs)
    formulas.assert_close(after.sample, changed.sample)
    formulas.assert_close(after.text, changed.text)


def test_only_the_chosen_attention_is_adapted(model: UniViGUTransformer3DModel) -> None:
    add_lora(model, LoraOptions(rank=2, attention=("attn1",)))
    assert all(".attn1." in name for name, _ in model.named_parameters() if is_lora_parameter(name))


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2)], ids=["all", "lora"])
def test_what_is_trained(model: UniViGUTransformer3DModel, lora: LoraOptions | None) -> None:
    if lora is not None:
        add_lora(model, lora)
    groups = {name: group_of(name, lora) for name, _ in model.named_parameters()}
    text, video = ({name for name, group in groups.items() if group == part} for part in ("text", "video"))
    assert text == set(filter(is_text_parameter, groups))
    assert video and (lora is not None) == any(map(is_lora_parameter, video))
    for rate in (0.0, 1e-4):
        freeze_by_rate(model, lora, {"video": rate, "text": 1e-3})
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == text | (video if rate else set())
        kind, sizes = "generator" if lora is None else "adapters", dict[str, int]()
        for name, parameter in model.named_parameters():
            part = "text stream" if is_text_parameter(name) else "adapters" if is_lora_parameter(name) else "generator"
            sizes[part] = sizes.get(part, 0) + parameter.numel()
        told, frozen = trained_and_frozen(model).removeprefix("trained: ").split("; frozen: ")
        assert f"text stream {sizes['text stream'] / 1e6:.2f} M" in told
        assert (f"{kind} {sizes[kind] / 1e6:.2f} M" in told) == (rate > 0)
        assert ("generator" in frozen) == (lora is not None or rate == 0)


@pytest.mark.parametrize("option", [{"rank": 0}, {"alpha": 0}, {"attention": ()}, {"attention": ("attn3",)}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=rf"lora\.{name}="):
        LoraOptions(**option)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2)], ids=["text", "lora"])
def test_a_run_moves_what_it_should_and_is_resumed(tmp_path: Path, lora: LoraOptions | None) -> None:
    """Through both stages; the checkpoint loads as a plain model whose merged weights compute the same."""
    folder = tmp_path / "foundation"
    tiny.make_pipeline().save_pretrained(folder)
    rate = 0.0 if lora is None else 1e-2
    stage = Stage(steps=3, text_length=8, warmup_steps=0, learning_rate=rate, tasks=TaskMixture(1, 1, 0))

    def fit(ckpt_path: str | None = None) -> Any:
        module = UniViGU(str(folder), lora=lora, optimizer=ADAMW, seed=1)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            callbacks=[StageSwitch({"a": stage}), saver],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(stages.Clips(), batch_size=12), ckpt_path=ckpt_path, weights_only=True)
        return module.transformer

    trained = fit()
    loaded = load_weights(tmp_path / "step=3.ckpt").eval()
    vocab = loaded.config.vocab_size
    start = tiny.make_wan()
    moved = {name for name, value in start.state_dict().items() if not torch.equal(value, loaded.state_dict()[name])}
    assert bool(moved) == (lora is not None)
    assert all(name.endswith(".weight") and ".attn" in name and ".norm" not in name for name in moved)
    inputs = formulas.make_inputs() | {"text_tokens": torch.randint(vocab, (3, 7))}
    formulas.assert_close(formulas.run(loaded, inputs).text, formulas.run(trained.eval(), inputs).text)
    resumed = fit(str(tmp_path / "step=1.ckpt"))
    for name, value in trained.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Checkpoints of a step of each kind of training."""
    root = tmp_path_factory.mktemp("trained")
    tiny.make_pipeline().save_pretrained(root / "foundation")
    kinds = {"lora": {"lora": LoraOptions(rank=2, alpha=4)}, "all": {}}
    for name, options in kinds.items():
        trainer = make_trainer(root / name)
        trainer.fit(UniViGU(str(root / "foundation"), seed=1, **options), DataLoader(stages.Clips(), batch_size=12))
        trainer.save_checkpoint(root / f"{name}.ckpt")
    return SimpleNamespace(root=root, foundation=str(root / "foundation"))


def make_trainer(root: Path, steps: int = 1) -> Trainer:
    stage = Stage(steps=2, text_length=8, warmup_steps=0, learning_rate=0.3, tasks=TaskMixture(1, 1, 0))
    return Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        callbacks=[StageSwitch({"a": stage})],
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def with_texts(items: list[dict[str, Any]]) -> dict[str, Any]:
    unknown: dict[str, Any] = {"scene": [None] * len(items)}
    return default_collate(items) | unknown | {name: ["a ring"] * len(items) for name in ("prompt", "caption")}


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["lora", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {"lora": LoraOptions(rank=2, alpha=4)},
        {"lora": LoraOptions(rank=2, alpha=64)},
        {"lora": LoraOptions(rank=3, attention=("attn1",))},
        {
            "lora": LoraOptions(rank=2, alpha=4),
            "architecture": ArchitectureOptions(clean_video_reads_text=False),
        },
        {},
    ],
    ids=["same", "alpha", "rank", "architecture", "all"],
)
def test_a_checkpoint_is_evaluated_as_it_was_trained(
    trained: SimpleNamespace, tmp_path: Path, saved: str, options: dict[str, Any]
) -> None:
    path = trained.root / f"{saved}.ckpt"
    module = UniViGU(trained.foundation, seed=1, evaluation=EvaluationOptions(generation=False), **options)
    loader = DataLoader(stages.Clips(), batch_size=12, collate_fn=with_texts)
    make_trainer(tmp_path).validate(module, loader, ckpt_path=str(path), weights_only=True)
    expected = load_weights(path).eval()
    inputs = formulas.make_inputs() | {"text_tokens": torch.randint(expected.config.vocab_size, (3, 7))}
    ours, theirs = formulas.run(module.transformer, inputs), formulas.run(expected, inputs)
    formulas.assert_close(ours.sample, theirs.sample)
    formulas.assert_close(ours.text, theirs.text)


@pytest.mark.parametrize(
    ("saved", "options", "message"),
    [
        ("lora", {}, r"'model\.lora': \(LoraOptions\(.*\), None\)"),
        ("all", {"lora": LoraOptions(rank=2)}, r"'model\.lora': \(None, LoraOptions\(.*\)\)"),
        ("lora", {"lora": LoraOptions(rank=3, alpha=4)}, r"'model\.lora': \(.*rank=2, .*rank=3, "),
        ("lora", {"lora": LoraOptions(rank=2, alpha=5)}, r"'model\.lora': \(.*alpha=4, .*alpha=5, "),
        ("lora", {"lora": LoraOptions(2, 4, ("attn1",))}, r"'model\.lora': .*attention=\('attn1',\)"),
    ],
)
def test_a_run_is_resumed_with_what_was_trained(
    trained: SimpleNamespace, tmp_path: Path, saved: str, options: dict[str, Any], message: str
) -> None:
    path = trained.root / f"{saved}.ckpt"
    module = UniViGU(trained.foundation, seed=1, **options)
    loader = DataLoader(stages.Clips(), batch_size=12)
    with pytest.raises(MisconfigurationException, match=rf"{saved}\.ckpt: .*{message}.*; resume .*model\.init_from"):
        make_trainer(tmp_path, steps=2).fit(module, loader, ckpt_path=str(path), weights_only=True)
