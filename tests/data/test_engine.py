"""Jobs on Ray write what they write here, whatever is killed.  UNIVIGU_SHARDS=64 takes more of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.damage import is_intact
from tests.data.ray_jobs import Render, TwoModels
from tests.tiny_captioner import write_captioner
from tools import encode, synthesize
from univigu.data.engine import RayEngine
from univigu.data.index import index_folder
from univigu.data.shards import Manifest, build_folder, write_shard
from univigu.shapes.scenes import sample_scene
from univigu.shapes.texts import prompt_of

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # before the import: Ray listens on 127.0.0.1 alone
ray = pytest.importorskip("ray")

SHARDS = int(os.environ.get("UNIVIGU_SHARDS", 6))
CLUSTER: dict[str, Any] = {"num_cpus": 2, "num_gpus": 2, "include_dashboard": False, "log_to_driver": False}
"""The GPUs are only numbers."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(**CLUSTER)
    yield
    ray.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build(folder: Path, work: Render, engine: Any = map) -> Manifest:
    return build_folder(folder, Manifest("video", {}), {f"{i:04d}.tar": i for i in range(SHARDS)}, work, engine)


def drive(after: int, folder: Path, marks: Path) -> None:
    """Render on a Ray of its own, and be killed when the manifest lists some shards."""
    save = Manifest.save

    def then_die(manifest: Manifest, folder: Path) -> None:
        save(manifest, folder)
        if len(manifest.shards) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    Manifest.save = then_die  # type: ignore[method-assign]  # in this process
    ray.init(**CLUSTER)
    build(folder, Render(marks), RayEngine(workers=1))


def test_kills_lose_and_repeat_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Workers and the driver are killed, and the driver starts again: the bytes of an undisturbed run without Ray."""
    made, marks = tmp_path / "made", tmp_path / "marks"
    build(tmp_path / "undisturbed", Render())
    marks.mkdir()
    driver = get_context("fork").Process(target=drive, args=(SHARDS // 2, made, marks))
    driver.start()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    assert {path.name for path in marks.iterdir()} == {"actor", "task0", "task1"}
    listed = Manifest.load(made)
    assert listed is not None and len(listed.shards) == SHARDS // 2 and not listed.complete
    before = {shard.name: (made / shard.name).stat().st_mtime_ns for shard in listed.shards}
    request.getfixturevalue("cluster")
    (marks / "task1").unlink()  # another kill
    build(made, Render(marks), RayEngine(workers=1))
    assert (marks / "task1").exists()
    assert before == {name: (made / name).stat().st_mtime_ns for name in before}
    assert contents(made) == contents(tmp_path / "undisturbed")
    refs, errors = index_folder(made)
    assert [ref.key for ref in refs] == [f"{i:08d}-{part}" for i in range(SHARDS) for part in "ab"]
    assert not errors and is_intact(made)


def test_synthesis_overlaps_two_models(cluster: None, tmp_path: Path) -> None:
    captioner = write_captioner(tmp_path / "captioner")
    (tmp_path / "prompts.txt").write_text("\n".join(prompt_of(sample_scene(seed)) for seed in range(4)))
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--steps=2", "--guidance-scale=1", "--shard-size=2"]
    arguments += [f"--captioner={captioner}", "--max-new-tokens=20", "--min-caption=1", "--device=cpu"]
    assert synthesize.main([*arguments, f"--output={tmp_path}/here"]) == 0
    assert synthesize.main([*arguments, f"--output={tmp_path}/ray", "--engine=ray", "--workers=1"]) == 0
    assert contents(tmp_path / "here") == contents(tmp_path / "ray") and is_intact(tmp_path / "ray")


def test_an_error_is_told_as_without_ray(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "videos").mkdir()
    write_shard(tmp_path / "videos" / "a.tar", [("k", {"json": b"{}", "mp4": b"x"})])
    arguments = [f"--source={tmp_path}/videos", f"--output={tmp_path}/made", "--strict", "--device=cpu"]
    printed = []
    for engine in ("--engine=local", "--engine=ray"):
        assert encode.main([*arguments, engine, "--workers=1"]) == 2
        printed.append(capsys.readouterr().err)
    told = [text[text.index("error: ") :] for text in printed]
    assert "sample 'k': missing_field in 'prompt'" in told[0] and told[0] == told[1]


def test_models_share_gpus_and_jobs_overlap(cluster: None, tmp_path: Path) -> None:
    engine = RayEngine()
    assert (engine.device, engine.workers) == ("cuda", 2)
    (tmp_path / "marks").mkdir()
    jobs = {f"{i}.tar": i for i in range(2)}
    build_folder(tmp_path / "made", Manifest("video", {}), jobs, TwoModels(tmp_path / "marks"), engine)
    found = {ref.key for ref in index_folder(tmp_path / "made")[0]}
    assert found in ({"0-0-0", "1-1-1"}, {"0-1-1", "1-0-0"})  # both models of a job on one GPU, each job on another


def test_the_number_of_workers_is_checked(cluster: None) -> None:
    with pytest.raises(ValueError, match="workers=0: expected at least 1"):
        RayEngine(workers=0)
