"""Jobs that are killed with SIGKILL and started again end with the same files and weights as undisturbed ones.

UNIVIGU_KILLS=20 kills each job at 20 random points instead of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from tests.conftest import REPO
from tools import encode, synthesize
from univigu.data.datamodule import VideoTextDataModule
from univigu.data.engine import start_worker
from univigu.shapes.scenes import sample_scene
from univigu.shapes.texts import prompt_of
from univigu.shapes.write import write_shapes
from univigu.training.callbacks.checkpoint import LastCheckpoint
from univigu.training.module import UniViGU
from univigu.training.stages import Stage, StageSwitch

pytestmark = pytest.mark.usefixtures("one_thread")
KILLS = int(os.environ.get("UNIVIGU_KILLS", 1))


def files(folder: Path) -> dict[str, str]:
    """Checksums of all files, hidden ones too."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def killed(job: Callable[..., object], *args: Any, progress: Callable[[], int], until: int) -> None:
    """Call a function in a fork until its progress reaches a number, then kill it and its children."""
    process = get_context("fork").Process(target=_lead, args=(job, args))
    process.start()
    while process.is_alive() and progress() < until:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _lead(job: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.setsid()
    job(*args)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["synthesize", "encode"])
def test_killed_data_jobs_write_the_same_files(job: str, tmp_path: Path) -> None:
    if job == "encode":
        write_shapes(tmp_path / "videos", "train", 8, shard_size=2)
        main, arguments = encode.main, ["--source", str(tmp_path / "videos"), "--workers=1", "--device=cpu"]
    else:
        prompts = [prompt_of(sample_scene(seed)) for seed in range(4)]
        (tmp_path / "prompts.txt").write_text("\n".join([*prompts, "red " * 200]))  # the last one is too long
        main, arguments = synthesize.main, ["--prompts", str(tmp_path / "prompts.txt"), "--device=cpu", "--steps=2"]
        arguments += ["--guidance-scale=1", "--shard-size=1"]
    assert main([*arguments, "--output", str(tmp_path / "undisturbed")]) == 0
    expected = files(tmp_path / "undisturbed")
    for kill in range(KILLS):
        output, until = tmp_path / f"killed-{kill}", random.Random(kill).randint(1, len(expected) - 2)
        progress = lambda: sum(path.is_file() for path in output.rglob("*"))  # noqa: B023, E731
        killed(main, [*arguments, "--output", str(output)], progress=progress, until=until)
        assert main([*arguments, "--output", str(output)]) == 0
        assert files(output) == expected


class Notes(Callback):
    """Writes down what each step saw and lost."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        row = {"step": trainer.global_step, "loss": float(outputs["loss"]).hex(), "keys": batch["key"]}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def data(root: Path) -> VideoTextDataModule:
    sizes = {"num_train_clips": 9, "num_val_clips": 1}
    return VideoTextDataModule(root=str(root), batch_size=2, num_workers=1, prompt_length=32, **sizes)


def fit(folder: Path, steps: int = 10) -> None:
    """Train, from the last checkpoint if there is one."""
    folder.mkdir(exist_ok=True)
    last = folder / "checkpoints" / "last.ckpt"
    stages = {"recall": Stage(steps=steps, target="prompt", text_length=32, warmup_steps=2)}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        limit_val_batches=0,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
        callbacks=[StageSwitch(stages), LastCheckpoint(every_n_train_steps=3), Notes(folder / "steps.jsonl")],
    )
    trainer.fit(UniViGU(), datamodule=data(folder.parent / "world"), ckpt_path=str(last) if last.exists() else None)


def outcome(folder: Path) -> tuple[dict[int, Any], dict[str, torch.Tensor]]:
    """What each step saw and lost, and the final weights.  A repeated step must be the same as before."""
    steps: dict[int, Any] = {}
    for row in map(json.loads, (folder / "steps.jsonl").read_text().splitlines()):
        assert steps.setdefault(row["step"], row) == row
    return steps, torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]


@pytest.mark.slow
def test_killed_training_continues_bit_for_bit(tmp_path: Path) -> None:
    data(tmp_path / "world").prepare_data()
    fit(tmp_path / "undisturbed")
    steps, weights = outcome(tmp_path / "undisturbed")
    assert list(steps) == list(range(1, 11))
    for kill in range(KILLS):
        folder = tmp_path / f"killed-{kill}"
        notes, until = folder / "steps.jsonl", random.Random(kill).randint(4, 8)
        progress = lambda: notes.read_text().count("\n") if notes.exists() else 0  # noqa: B023, E731
        killed(fit, folder, progress=progress, until=until)
        fit(folder)
        resumed_steps, resumed_weights = outcome(folder)
        assert resumed_steps == steps
        assert all(torch.equal(value, weights[name]) for name, value in resumed_weights.items())


def start(*command: str) -> subprocess.Popen[str]:
    """A command as the first process of a session of its own."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True, text=True, **pipes)


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (reached := done()) and time.monotonic() < end:
        time.sleep(0.1)
    return reached


def processes_of(session: int) -> dict[int, str]:
    """Commands of a session's processes, by their ids; in a line of /proc/PID/stat it stands fourth behind the name."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state != "Z":
                found[int(path.parent.name)] = path.with_name("cmdline").read_text().replace("\0", " ")
        except OSError:  # it has just ended
            continue
    return dict(sorted(found.items()))


POOL = """
import sys, time
from univigu.cli import exit_code
from univigu.data.engine import SpawnPool
def run():
    with SpawnPool(1) as pool:
        jobs = [pool.submit(time.sleep, 0.1) for _ in range(10000)]
        jobs[0].result()
        print("begun", flush=True)
        jobs[-1].result()
if __name__ == "__main__":
    sys.exit(exit_code(run))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_pool_ends_with_its_process(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    process = start(str(tmp_path / "pool.py"))
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert wait_until(lambda: not processes_of(process.pid), 20)  # the tracker of semaphores has ended, too


class Slow(Dataset[int]):
    """Each item takes a minute."""

    begun = get_context("fork").Event()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> int:
        self.begun.set()
        time.sleep(60)
        return number


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="the system does not tell who sends a signal")
def test_a_loader_worker_obeys_only_its_process() -> None:
    """A scheduler sends SIGTERM to all processes, of which the training is to save a checkpoint first."""
    iterator: Any = iter(DataLoader(Slow(), num_workers=1, worker_init_fn=start_worker))
    (worker,) = iterator._workers
    assert Slow.begun.wait(20)
    subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, {signal.SIGTERM})"], check=True)
    worker.join(1.5)
    assert worker.is_alive()
    began = time.monotonic()
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive() and time.monotonic() - began < 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("to", ["all", "one"])
def test_signals_to_two_ranks(to: str, in_tmp: Path, small_data: list[str]) -> None:
    """SIGTERM to all ends with a checkpoint and its code; a rank that is killed ends the other, with a message."""
    options = ["--media.every_n_steps=0", "--trainer.log_every_n_steps=1", "--data.num_workers=1"]
    options += ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp"]
    process = start("-m", "univigu.cli", "fit", "--config=configs/recall.yaml", *small_data, *options)
    curves = Path("runs/recall/tensorboard/version_0")
    assert wait_until(lambda: sum(file.stat().st_size for file in curves.glob("events*")) > 4000, 150)
    if to == "all":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        ranks = [pid for pid, command in processes_of(process.pid).items() if "univigu.cli" in command]
        os.kill(ranks[1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert wait_until(lambda: not processes_of(process.pid), 20)
    if to == "all":
        step = torch.load("runs/recall/checkpoints/last.ckpt", weights_only=True)["global_step"]
        assert process.returncode == 143 and f"training ends after step {step}" in printed
    else:
        # Either Lightning sees it first, or the other rank in a collective.
        assert process.returncode in (1, -signal.SIGKILL)
        assert "terminated with code -9" in printed or "RuntimeError" in printed
