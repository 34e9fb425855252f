"""Sharded training: two processes on the CPU do what one does, and either takes up what the other left."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.checkpoint import load
from torch.utils.data import DataLoader, Dataset, Subset

from tests import tiny
from tests.conftest import REPO, run_ranks
from univigu.checkpoint import load_weights, read_checkpoint
from univigu.cli import main
from univigu.flow import objective
from univigu.flow.objective import TaskMixture
from univigu.models.lora import LoraOptions
from univigu.models.options import ArchitectureOptions
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import sharded_reader
from univigu.training.callbacks import WeightEMA
from univigu.training.callbacks.checkpoint import LastCheckpoint
from univigu.training.module import UniViGU
from univigu.training.optim import OptimizerOptions
from univigu.training.parallel import ShardedStrategy
from univigu.training.stages import Stage, StageSwitch

BATCH, EPOCH = 4, 2  # samples a process and step, steps an epoch
ADAMW = OptimizerOptions(name="adamw")
RATES = {"steps": 6, "text_learning_rate": 1e-3, "teacher_weight": 0.0}  # none teaches a sharded model
STAGES = {
    "recall": Stage(text_length=8, learning_rate=0.0, warmup_steps=2, tasks=TaskMixture(1, 1, 0), **RATES),
    "refine": Stage(
        target="caption",
        text_length=12,
        learning_rate=1e-3,
        warmup_steps=0,
        tasks=TaskMixture(0.25, 0.5, 0.25),
        **RATES,
    ),
}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # would shuffle
}


class Clips(Dataset):
    """Random latents, prompts and captions, as the loaders give them."""

    def __len__(self) -> int:
        return 2 * BATCH * EPOCH

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        texts = {
            name: torch.cat([torch.randint(3, 100, (length - 2,), generator=generator), torch.tensor([1, 0])])
            for name, length in (("prompt_ids", 8), ("caption_ids", 12))
        }
        return {"key": str(index), "latents": torch.randn(tiny.CHANNELS, 2, 4, 4, generator=generator), **texts}


class AsTwo(UniViGU):
    """One process that takes a step of two: each half of its batch with that process's random numbers."""

    rank = 0

    @property
    def global_rank(self) -> int:
        return self.rank

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        losses = []
        for self.rank in (0, 1):
            part = {name: value[self.rank :: 2] for name, value in batch.items()}
            losses.append(super().training_step(part, batch_idx))
        return torch.stack(losses).mean()


class Diary(Callback):
    """The losses, and what the sharded weights look like."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.moved: dict[int, bool] = {}
        self._before: torch.Tensor | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses[trainer.global_step - 1] = outputs["loss"].item()
        weight = pl_module.transformer.blocks[1].ffn.net[2].weight.detach()
        local = (weight.to_local() if hasattr(weight, "to_local") else weight).clone()
        self.moved[trainer.global_step - 1] = self._before is not None and not torch.equal(local, self._before)
        self._before = local


def train(
    folder: str,
    root: str,
    *,
    processes: int,
    sharded: bool = True,
    ckpt_path: str | None = None,
    steps: int = 12,
    compute_dtype: str = "float32",
    compile_backend: str | None = None,
    saves: int | None = None,
    tasks: tuple[int, int, int] | None = None,
    text_flow: Any = "mask",
    callbacks: tuple[Callback, ...] = (),
    **options: Any,
) -> Diary:
    """A run of this process's share, with a checkpoint at every ``saves`` steps; one process stands for two.

    ``tasks`` are the shares in both stages, where they are not those of ``STAGES``.
    """
    torch.set_num_threads(1)
    kind = UniViGU if processes == 2 else AsTwo
    changes = {name: options.pop(name) for name in ("separate_text_ffn", "text_attention") if name in options}
    options = {"architecture": ArchitectureOptions(text_flow, **changes), "gradient_checkpointing": True} | options
    module = kind(folder, seed=3, optimizer=ADAMW, compile_blocks=compile_backend is not None, **options)
    module.compile_backend = compile_backend or ""
    diary = Diary()
    stages = {name: replace(stage, tasks=TaskMixture(*tasks)) if tasks else stage for name, stage in STAGES.items()}
    saver = [ModelCheckpoint(root, filename="{step}", every_n_train_steps=saves, save_top_k=-1)] if saves else []
    trainer = Trainer(
        default_root_dir=root,
        devices=processes if sharded else 1,
        max_steps=steps,
        strategy=ShardedStrategy(compute_dtype=compute_dtype) if sharded else "auto",
        gradient_clip_val=0.5,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in (*saver, *callbacks)),
        callbacks=[StageSwitch(stages), diary, *saver, *callbacks],
        **QUIET,
    )
    share = Subset(Clips(), range(int(os.environ.get("RANK", 0)), len(Clips()), processes))
    loader: DataLoader = DataLoader(share, batch_size=BATCH * 2 // processes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "MAX_LOGITS", 500)  # the loss is computed in parts
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return diary


def average(folder: str, root: str, *, processes: int, distributed: bool) -> Diary:
    """A run with averaged weights, cut short; its evaluation, whose weights are checked; a resume without the mean."""
    torch.set_num_threads(1)
    path = Path(root) / "last.ckpt"
    loader: DataLoader = DataLoader(Clips(), batch_size=BATCH)

    def make(*callbacks: Callback, init_from: str | None = None, **options: Any) -> tuple[Trainer, UniViGU]:
        trainer = Trainer(
            default_root_dir=root,
            devices=processes,
            enable_checkpointing=bool(callbacks),
            strategy=ShardedStrategy(distributed, "float32"),
            limit_val_batches=0,
            callbacks=[StageSwitch(STAGES), *callbacks],
            **QUIET,
            **options,
        )
        return trainer, UniViGU(folder, init_from, seed=3, optimizer=ADAMW)

    trainer, module = make(WeightEMA(decay=0.5, warmup=False), LastCheckpoint(root), max_steps=3)
    trainer.fit(module, loader)
    trainer, module = make()
    with pytest.raises(MisconfigurationException, match=r"last\.ckpt: use model\.init_from"):
        trainer.validate(module, loader, ckpt_path=path)
    trainer, module = make(init_from=str(path))  # as the command line does
    trainer.validate(module, loader)
    expected = load_weights(path).state_dict()
    for name, value in module.transformer.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value.full_tensor(), expected[name]), name
    key = "transformer.text_head.linear.weight"
    trained = {key: torch.empty_like(expected["text_head.linear.weight"])}
    if Path(path).is_dir():
        load({"state_dict": trained}, checkpoint_id=path)
    else:
        trained = read_checkpoint(path)["state_dict"]
    assert not torch.equal(trained[key], expected["text_head.linear.weight"])
    assert not hasattr(module, "ema")

    trainer, module = make(max_steps=4)
    with pytest.raises(MisconfigurationException, match=r"the WeightEMA callback': \(True, False\)"):
        trainer.fit(module, loader, ckpt_path=path)
    return Diary()


def refuse(folder: str, root: str, *, processes: int, sharded: bool = True, refusals: None = None) -> Diary:
    """A run with adapters, resumed with other options; the errors go to a file, without the checkpoint's path."""
    first: dict[str, Any] = {"lora": LoraOptions(rank=2)}
    kind: dict[str, Any] = {"processes": processes, "sharded": sharded}
    train(folder, root, steps=1, saves=1, **first, **kind)
    path, found = f"{root}/step=1.ckpt", {}
    for name, change in {
        "rank": {"lora": LoraOptions(rank=3)},
        "no adapters": {"lora": None},
        "own attention": {"text_attention": "own"},
        "mean": {"callbacks": (WeightEMA(),)},
    }.items():
        with pytest.raises(MisconfigurationException) as error:
            train(folder, root, steps=2, ckpt_path=path, **first | change, **kind)
        found[name] = str(error.value).replace(path, "")
    Path(root, f"refused-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
    return Diary()


class DieWhileSaving(Callback):
    """Kills the second process in the middle of saving a step."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step == 8 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def launch(processes: int, folder: Path, *jobs: dict[str, Any]) -> list[list[Diary]]:
    """Run jobs in other processes; the diaries of each, by process."""
    root = Path(jobs[0]["root"])
    root.mkdir(parents=True, exist_ok=True)
    run_ranks(run_jobs, root, [{"folder": str(folder), **job} for job in jobs], processes=processes)
    return [
        [
            SimpleNamespace(**{name: {int(k): v for k, v in value.items()} for name, value in page.items()})  # type: ignore[misc]
            for page in json.loads((root / f"diary-{rank}.json").read_text())
        ]
        for rank in range(processes)
    ]


def run_jobs(root: Path, jobs: list[dict[str, Any]]) -> None:
    """What each of the processes does."""
    warnings.filterwarnings("error", message="FSDP2-wrapped module")  # of outputs that are views
    processes = int(os.environ["WORLD_SIZE"])
    kinds = {"distributed": average, "refusals": refuse}
    diaries = [
        next((kind for name, kind in kinds.items() if name in job), train)(processes=processes, **job) for job in jobs
    ]
    pages = [{"losses": diary.losses, "moved": diary.moved} for diary in diaries]
    (root / f"diary-{os.environ['RANK']}.json").write_text(json.dumps(pages))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foundation")
    tiny.make_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Both stages in one process without sharding."""
    root = tmp_path_factory.mktemp("plain")
    diary = train(str(folder), str(root), processes=1, sharded=False, saves=4)
    return SimpleNamespace(losses=diary.losses, moved=diary.moved, root=root)


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same in two, some steps of other kinds, and evaluations on the mean, see ``average``."""
    root = tmp_path_factory.mktemp("two")
    jobs = (
        {"root": str(root), "saves": 2},
        {"root": str(root / "embedding"), "text_flow": "embedding", "steps": 5},
        {"root": str(root / "bfloat16"), "compute_dtype": "bfloat16", "steps": 8, "separate_text_ffn": False},
        {"root": str(root / "folder"), "distributed": True},
        {"root": str(root / "file"), "distributed": False},
        {"root": str(root / "refused"), "refusals": None},
        {
            "root": str(root / "compiled"),
            "compile_backend": "aot_eager",
            "steps": 8,
            "ckpt_path": f"{root}/step=4.ckpt",
            "tasks": (1, 0, 0),  # the blocks are compiled for each size anew, which takes seconds
        },
    )
    return SimpleNamespace(diaries=launch(2, folder, *jobs), root=root)


def assert_losses(diaries: list[Any], expected: Any, steps: range, tolerance: float = 1e-5) -> None:
    """The mean of the processes' losses."""
    assert all(list(diary.losses) == list(steps) for diary in diaries)
    for step in steps:
        mean = sum(diary.losses[step] for diary in diaries) / len(diaries)
        assert mean == pytest.approx(expected.losses[step], rel=tolerance, abs=tolerance), step


@pytest.mark.slow
def test_two_processes_train_as_one(plain: SimpleNamespace, two: SimpleNamespace) -> None:
    """The same global batch: the same losses, before and after the stage switch, which unfreezes the generator."""
    diaries = [diaries[0] for diaries in two.diaries]
    assert_losses(diaries, plain, range(12))
    assert diaries[0].losses[0] != diaries[1].losses[0]  # each has samples of its own
    for diary in (plain, *diaries):
        assert [step for step, moved in diary.moved.items() if moved] == list(range(6, 12))


@pytest.mark.slow
def test_the_embedding_flows_table_is_trained_from_all_processes(
    folder: Path, two: SimpleNamespace, tmp_path: Path
) -> None:
    diary = train(str(folder), str(tmp_path), processes=1, sharded=False, text_flow="embedding", steps=5)
    assert_losses([diaries[1] for diaries in two.diaries], diary, range(5))


@pytest.mark.slow
def test_bfloat16_trains_past_a_stage_that_freezes_whole_blocks(two: SimpleNamespace) -> None:
    for diaries in two.diaries:
        losses, moved = diaries[2].losses, diaries[2].moved
        assert len(losses) == 8 and all(torch.tensor(list(losses.values())).isfinite())
        assert moved[6] and moved[7] and not moved[5]


@pytest.mark.slow
def test_compiled_blocks_train_as_others(
    folder: Path, plain: SimpleNamespace, two: SimpleNamespace, tmp_path: Path
) -> None:
    """With their own backward pass, from an uncompiled checkpoint on, past the switch of stages."""
    options: dict[str, Any] = {"ckpt_path": str(plain.root / "step=4.ckpt"), "steps": 8, "tasks": (1, 0, 0)}
    diary = train(str(folder), str(tmp_path), processes=1, sharded=False, **options)
    assert_losses([diaries[6] for diaries in two.diaries], diary, range(4, 8), 1e-4)


@pytest.mark.slow
def test_checkpoints_go_from_two_processes_to_one_and_back(
    folder: Path, plain: SimpleNamespace, two: SimpleNamespace, tmp_path: Path
) -> None:
    """Saved by two in each of the stages, continued by one, saved, continued by two."""
    ((first, second),) = launch(
        1,
        folder,
        {"root": str(tmp_path / "one"), "ckpt_path": str(two.root / "step=4.ckpt"), "steps": 8},
        {"root": str(tmp_path / "late"), "ckpt_path": str(two.root / "step=8.ckpt"), "steps": 11, "saves": 10},
    )
    assert_losses([first], plain, range(4, 8))
    assert_losses([second], plain, range(8, 11))
    back = launch(2, folder, {"root": str(tmp_path / "back"), "ckpt_path": str(tmp_path / "late" / "step=10.ckpt")})
    assert_losses([diaries[0] for diaries in back], plain, range(10, 12))


@pytest.mark.slow
def test_a_resume_with_another_model_is_refused_as_without_sharding(
    folder: Path, two: SimpleNamespace, tmp_path: Path
) -> None:
    refuse(str(folder), str(tmp_path), processes=1, sharded=False)
    expected = json.loads((tmp_path / "refused-0.json").read_text())
    parts = ("(LoraOptions(rank=2, ", "model.lora': (LoraOptions(", "text_attention': (", "callback': (False, True)")
    for part, message in zip(parts, expected.values(), strict=True):
        assert part in message and "\n" not in message
    for rank in (0, 1):
        assert json.loads((two.root / "refused" / f"refused-{rank}.json").read_text()) == expected


@pytest.mark.slow
def test_a_killed_process_ends_the_other(folder: Path, plain: SimpleNamespace, tmp_path: Path) -> None:
    """In a minute, with a message; the earlier checkpoint is whole and resumes on one process and on two."""
    options = {"root": str(tmp_path), "callbacks": (LastCheckpoint(str(tmp_path), 4), DieWhileSaving())}
    context = run_ranks(run_jobs, tmp_path, [{"folder": str(folder), **options}], join=False)
    end = time.monotonic() + 60
    for process in context.processes:
        process.join(max(0, end - time.monotonic()))
    assert [process.exitcode for process in context.processes] == [1, -signal.SIGKILL]
    assert "RuntimeError" in pickle.loads(Path(context.error_files[0]).read_bytes())
    assert sharded_reader(tmp_path / "last.ckpt") and not (tmp_path / "last.old").exists()
    for processes in (1, 2):
        resumed = {"root": f"{tmp_path}/{processes}", "ckpt_path": f"{tmp_path}/last.ckpt", "steps": 6}
        assert_losses([diaries[0] for diaries in launch(processes, folder, resumed)], plain, range(4, 6))


@pytest.mark.slow
def test_a_sharded_checkpoint_becomes_a_folder(plain: SimpleNamespace, two: SimpleNamespace, tmp_path: Path) -> None:
    from tools import convert

    path = two.root / "step=12.ckpt"
    assert path.is_dir() and len(list(path.glob("*.distcp"))) == 2
    assert convert.main(["transformer", "--checkpoint", str(path), "--output", str(tmp_path / "made")]) == 0
    made = UniViGUTransformer3DModel.from_pretrained(tmp_path / "made")
    whole = load_weights(plain.root / "step=12.ckpt")
    assert made.config.text_length == whole.config.text_length == 12
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_sharded_model_is_evaluated_on_the_mean(two: SimpleNamespace) -> None:
    """Each process takes its share of the mean, from a checkpoint of either kind; checked by ``average``."""
    assert (two.root / "folder" / "last.ckpt").is_dir() and (two.root / "file" / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False])
def test_every_callback_runs_in_two_processes(
    sharded: bool, small_data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Held-out samples and accuracies, the mean of the weights, the report, the checkpoint; sharded or plain DDP."""
    configs = [f"--config={REPO}/configs/{name}.yaml" for name in ("recall", "frozen", *(["fsdp"] * sharded))]
    args = [
        "fit",
        *configs,
        *small_data,
        "--trainer.devices=2",
        "--media.every_n_steps=2",
        "--media.num_samples=2",
        "--report.num_samples=2",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=2",
        "--trainer.callbacks+=univigu.training.callbacks.WeightEMA",
        "--trainer.callbacks+=univigu.training.callbacks.CaptionAccuracy",
        "--trainer.callbacks.every_n_steps=2",
        "--trainer.callbacks.num_clips=2",
        *([] if sharded else ["--trainer.strategy=ddp"]),
        "--monitor.every_n_steps=2",
        "--data.batch_size=2",
        "--model.sampling.num_inference_steps=2",
        "--model.sampling.caption_steps=2",
    ]
    monkeypatch.chdir(tmp_path)
    run_ranks(main, args)
    printed = capfd.readouterr()
    assert "FSDP2-wrapped module" not in printed.err
    assert printed.out.count("captioned from the video alone") == 1  # rank 0 alone prints
    path = tmp_path / "runs/recall/checkpoints/last.ckpt"
    assert path.is_dir() == sharded and [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    model = load_weights(path)
    assert model.config.text_length == 32 and model.text_head.linear.weight.abs().sum() > 0


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"strategy\.compute_dtype='float16'"):
        ShardedStrategy(compute_dtype="float16")  # type: ignore[arg-type]
