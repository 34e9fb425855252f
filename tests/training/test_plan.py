"""Plans: Wan2.1's sizes from the overlays, and numbers that small real runs agree with."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import REPO, added_memory, in_fork, run_ranks
from tools import plan as plan_tool
from univigu.flow.objective import TaskMixture, UniFlowBatch, UniFlowObjective
from univigu.flow.text import make_text_flow
from univigu.models.encode import CONVENTIONS
from univigu.models.lora import LoraOptions
from univigu.models.official import ARCHITECTURE, official_differences
from univigu.models.text import is_text_parameter
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import empty_model
from univigu.training.optim import OptimizerOptions
from univigu.training.parallel import build_sharded
from univigu.training.plan import WAN21, Workload, added_parameters, count_step, make_plan, workloads_of
from univigu.training.stages import Stage

SIZES = {"1.3b": (1536, 12, 30, 8960), "14b": (5120, 40, 40, 13824)}  # width, heads, layers, FFN, as published


def wan_count(width: int, layers: int, ffn: int) -> int:
    """Parameters of Wan2.1 T2V, added up by hand: text 4096, sinusoid 256, 16 channels, patches of 1x2x2."""
    attention = 4 * (width * width + width) + 2 * width
    block = 2 * attention + 2 * width + (2 * width * ffn + ffn + width) + 6 * width
    embeddings = (
        (16 * 4 * width + width)
        + (4096 * width + width + width * width + width)
        + (256 * width + width + width * width + width)
        + (width * 6 * width + 6 * width)
    )
    return layers * block + embeddings + (width * 64 + 64) + 2 * width


# ---------------------------------------------------------------------- the overlays


def overlay(size: str, stage: str = "recall") -> list[str]:
    scales = ["wan2.1-1.3b"] + ["wan2.1-14b"] * (size == "14b")
    return [f"--config={REPO}/configs/{name}.yaml" for name in (stage, *scales, "fsdp")]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_overlays_are_wan21(size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    work = workloads_of(overlay(size))["recall"]
    width, heads, layers, ffn = SIZES[size]
    assert work.video_tokens == 21 * 30 * 52 == 32760 and work.stage.text_length == 256
    assert work.compute_dtype == torch.bfloat16 and work.prompt_length == 512 and work.lora is None
    model = empty_model(UniViGUTransformer3DModel, work.transformer)
    config = model.config
    assert config.num_attention_heads == heads and config.num_layers == layers and config.ffn_dim == ffn
    assert (config.vocab_size, config.text_flow, config.text_positions) == (256384, "uniform", 0)
    assert not official_differences(model, ARCHITECTURE)  # the paper's, which its authors' code can load
    wans = {name: value for name, value in model.named_parameters() if not is_text_parameter(name)}
    count = wan_count(width, layers, ffn)
    assert sum(value.numel() for value in wans.values()) == count
    assert count == {"1.3b": 1_418_996_800, "14b": 14_288_491_584}[size]
    # A Wan folder's weights fit, with none missing but the text stream's.
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**{k: v for k, v in WAN21[f"Wan2.1-T2V-{size.upper()}"].items()}).state_dict()
    missing, unexpected = model.load_state_dict(theirs, strict=False, assign=True)
    assert not unexpected and missing and all(is_text_parameter(name) for name in missing)
    text = sum(value.numel() for name, value in model.named_parameters() if is_text_parameter(name))
    added = added_parameters(work.model())
    assert sum(row[1] for row in added.values()) == text
    assert added["vocab_embed"] == (256384 * width,) * 3
    assert added["blocks.*.ffn_t"][1] == layers * (2 * width * ffn + ffn + width) and added["blocks.*.attn1"][1] == 0


@pytest.mark.parametrize("size", SIZES)
def test_overlays_have_the_authors_architecture(size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the conventions of Wan's inputs differ."""
    monkeypatch.chdir(tmp_path)
    works = workloads_of(overlay(size, "two_stage"))
    assert list(works) == ["recall", "refine"]
    for work in works.values():
        model = empty_model(UniViGUTransformer3DModel, work.transformer | {"num_layers": 1})
        model.register_to_config(text_length=work.stage.text_length)
        assert not official_differences(model, ARCHITECTURE)
        assert set(official_differences(model)) == set(CONVENTIONS)


def test_a_stage_and_a_callback_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "run: [mine]\nstages: {mine: {steps: 3}}\ntrainer: {callbacks: univigu.training.callbacks.WeightEMA}\n"
    )
    work = workloads_of([f"--config={tmp_path}/mine.yaml", "--stages.mine.text_length=32"])["mine"]
    assert (work.stage.steps, work.stage.text_length, work.averaged) == (3, 32, True)


def test_a_foundation_that_is_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    args = [f"--config={REPO}/configs/recall.yaml", "--model.foundation=nowhere"]
    assert plan_tool.main(args) == 2
    assert "nowhere" in capsys.readouterr().err
    assert plan_tool.main([*args, "--utilisation", "2"]) == 2
    assert "--utilisation 2.0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_prints_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    refine, both = (
        [f"--config={REPO}/configs/{name}.yaml" for name in (stage, "frozen")] for stage in ("refine", "two_stage")
    )
    assert plan_tool.main([*refine, "--world-size", "2", "--device", "h100", "--utilisation", "0.3"]) == 0
    printed = capsys.readouterr().out
    assert "stage refine, batch" in printed and "on each of 2" in printed and "30% used" in printed
    assert plan_tool.main([*both, "--modules", "--model.lora.rank=4"]) == 0
    printed = capsys.readouterr().out
    assert "stage recall, LoRA" in printed and "stage refine, LoRA" in printed
    assert "blocks.*.ffn_t" in printed and "of Wan's own" in printed


# ---------------------------------------------------------------------- against what is measured

SMALL: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 1024,
    "num_layers": 5,
    "vocab_size": 2048,
    "text_flow": "mask",
}


def small(**changes: Any) -> Workload:
    stage = Stage(text_length=64, tasks=TaskMixture(1, 0, 0))
    adamw = OptimizerOptions(name="adamw")
    return replace(Workload(dict(SMALL), (16, 5, 32, 32), 32, stage, optimizer=adamw), **changes)


def real_step(work: Workload, checkpointing: bool, batch_size: int = 1) -> None:
    """A step of it on the CPU, with the optimizer's; sharded where there are several processes."""
    model = UniViGUTransformer3DModel(**work.transformer)
    if dist.is_initialized():
        mesh, full = init_device_mesh("cpu", (dist.get_world_size(),)), model
        model = build_sharded(lambda: full, None, mesh, torch.device("cpu"), torch.float32)
        del full
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    batch = UniFlowBatch(
        torch.randn(batch_size, *work.latents),
        torch.randn(batch_size, work.prompt_length, 64),
        torch.zeros(1, work.prompt_length, 64),
        torch.zeros(batch_size, work.stage.text_length, dtype=torch.int64),
    )
    counts = [batch_size * (name > 0) for name in vars(work.stage.tasks).values()]
    objective = UniFlowObjective(make_text_flow(model.config.text_flow, model.config.vocab_size))
    for _ in range(2):  # the optimizer's state is there in the second
        objective(model, batch, counts).total(batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text_flow", "task", "checkpointing"),
    [("mask", "joint", False), ("mask", "understand", True), ("mask", "generate", True), ("embedding", "joint", True)],
)
def test_operations_are_those_that_are_done(
    text_flow: str, task: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("univigu.flow.objective.MAX_LOGITS", 2048 * 10)
    tasks = TaskMixture(**{name: float(name == task) for name in vars(TaskMixture())})
    work = small(
        transformer=SMALL | {"num_layers": 2, "ffn_dim": 128, "text_flow": text_flow},
        latents=(16, 3, 16, 16),
        stage=Stage(text_length=24, tasks=tasks),
        batch_size=2,
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others on the CPU are not counted
        real_step(work, checkpointing, batch_size=2)
    assert count_step(work, checkpointing)[0] == pytest.approx(counter.get_total_flops() / 2, rel=0.1)


@pytest.mark.slow
def test_freezing_and_adapters_cost_less() -> None:
    layers = {"transformer": SMALL | {"num_layers": 2}, "latents": (16, 3, 16, 16)}
    frozen = Stage(text_length=64, tasks=TaskMixture(1, 0, 0), learning_rate=0)
    everything, recomputed = (make_plan(small(**layers), checkpointing=c) for c in (False, True))
    text = make_plan(small(**layers, stage=frozen))
    lora = make_plan(small(**layers, lora=LoraOptions(rank=4)))
    assert text.trained_parameters < lora.trained_parameters < everything.trained_parameters
    assert lora.parameters - everything.parameters == 2 * 2 * 4 * 2 * 4 * 256
    assert text.flops < lora.flops < everything.flops < recomputed.flops
    assert text.optimizer < lora.optimizer < everything.optimizer == 8 * everything.parameters
    split = make_plan(small(**layers), world_size=4)
    assert split.weights == everything.weights // 4 and split.gathered > 0 == everything.gathered
    assert recomputed.activations < everything.activations
    assert make_plan(small(**layers, averaged=True)).weights == 2 * everything.weights
    half = make_plan(small(**layers, stage=frozen, half=True, compute_dtype=torch.bfloat16))
    assert half.weights == 2 * text.parameters + 2 * text.trained_parameters and half.gathered == 0
    with pytest.raises(ValueError, match="world_size=0"):
        make_plan(small(), 0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_a_run_takes(checkpointing: bool) -> None:
    work = small(transformer=SMALL | {"num_layers": 3})
    tiny = replace(work, transformer=SMALL | {"num_layers": 1})
    planned = make_plan(work, checkpointing=checkpointing).total
    steps = partial(real_step, tiny, checkpointing), partial(real_step, work, checkpointing)
    measured = in_fork(added_memory, *steps)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="needs the cores for itself: run it with -n0")
def test_memory_is_what_two_processes_take(tmp_path: Path) -> None:
    """In the second process: the first one builds the whole model. A late process would gather more at once."""
    work = small(transformer=SMALL | {"num_layers": 6})
    in_fork(run_ranks, measure_share, work, tmp_path / "measured")  # earlier tests leave memory that is used again
    measured = int((tmp_path / "measured").read_text())
    assert make_plan(work, 2, checkpointing=True).total == pytest.approx(measured, rel=0.1)


def measure_share(work: Workload, path: Path) -> None:
    dist.init_process_group("gloo")
    tiny = replace(work, transformer=SMALL | {"num_layers": 1})
    measured = added_memory(partial(real_step, tiny, True), partial(real_step, work, True))
    if dist.get_rank() == 1:
        path.write_text(str(measured))
