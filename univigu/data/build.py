"""Fill a folder with shards in parallel, so that it can be cut off anywhere and completed later."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from univigu.data.sample import DataError
from univigu.data.shards import MANIFEST, Manifest, ShardInfo

log = logging.getLogger(__name__)

PARTS = ".manifest-*.json"
RANKS = ("RANK", "WORLD_SIZE")
"""Variables in which torchrun tells a process its number, and how many there are."""
SLURM_RANKS = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
"""The same of ``srun``.  A job's own shell or script has SLURM_NTASKS, and a script SLURM_PROCID=0, but is no step."""


def _single_thread() -> None:
    import torch

    torch.set_num_threads(1)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SpawnPool:
    """Processes that are started when the first job comes, so that a run with nothing to do starts none.

    They are spawned and not forked: they decode videos, and decord's threads do not survive a fork.

    Args:
        workers: number of processes; None takes one for every usable core.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers}: expected at least 1")
        self.workers = workers or usable_cores()
        self._executor: ProcessPoolExecutor | None = None

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run ``work(*args)`` in one of the processes."""
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_single_thread)
        return self._executor.submit(work, *args)

    def __enter__(self) -> SpawnPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Share:
    """Which of several processes this one is; they divide a folder's shards among themselves without talking."""

    rank: int = 0
    """Number of this process, from 0."""
    world_size: int = 1
    """How many there are."""

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"world_size={self.world_size}: expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank}: expected one in [0, {self.world_size})")

    @classmethod
    def from_environment(cls, rank: int | None = None, world_size: int | None = None) -> Share:
        """What is not given is taken from RANK and WORLD_SIZE, as torchrun sets them, or else from what srun sets.

        Raises:
            ValueError: a variable that is not a number, or a rank outside the world.
        """

        def number(name: str, default: int) -> int:
            text = os.environ.get(name, str(default))
            if not text.isdecimal():
                raise ValueError(f"{name}={text!r}: expected a number")
            return int(text)

        by_srun = not any(name in os.environ for name in RANKS) and all(name in os.environ for name in SLURM_RANKS)
        names = SLURM_RANKS if by_srun else RANKS
        return cls(
            number(names[0], 0) if rank is None else rank,
            number(names[1], 1) if world_size is None else world_size,
        )

    def of(self, names: Iterable[str]) -> list[str]:
        """This process's part of the names."""
        return sorted(names)[self.rank :: self.world_size]

    @property
    def manifest(self) -> str:
        """Name of the file in which this process lists its finished shards."""
        return MANIFEST if self.world_size == 1 else f".manifest-{self.rank:05d}.json"


def this_device() -> str:
    """The GPU that belongs to this process by LOCAL_RANK or SLURM_LOCALID, or the CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    number = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return f"cuda:{int(number) % torch.cuda.device_count()}"


def progress_bar() -> Progress:
    """A bar on standard error with counts and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def build_folder(
    folder: Path,
    manifest: Manifest,
    jobs: Mapping[str, Any],
    work: Callable[[Path, Any], ShardInfo],
    pool: SpawnPool | None,
    description: str,
    share: Share = Share(),
    progress: Progress | None = None,
) -> Manifest:
    """Write one shard a job and keep the manifest up to date; what is already there and whole stays.

    It can be killed anywhere: a shard and a manifest appear under their names only when they are whole, and what no
    manifest lists is made again.  Several processes each list their shards in a file of their own, and whichever
    finds all of them done writes ``manifest.json``; a later run may have another number of processes.

    Args:
        folder: where; made if need be.
        manifest: kind and parameters of the result.
        jobs: by the shard's file name, what ``work`` makes it of; the same in all processes.
        work: writes one shard; a module-level function, if there is a pool.
        pool: runs ``work`` in other processes; None runs it in this one.
        description: shown beside the progress bar.
        share: which part of the jobs is this process's.
        progress: a bar to use instead of a new one; ``work`` may show more on it.

    Returns:
        the manifest; complete unless other processes have shards left to write.

    Raises:
        DataError: the folder holds shards of other parameters, or shards without a manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if _is_whole(folder, manifest, jobs):  # nothing to write: the folder may be one that cannot be written to
        return manifest
    with alone(folder, share):
        if _is_whole(folder, manifest, jobs):  # by now, through who had the lock
            return manifest
        done = {shard.name for shard in manifest.shards}
        missing = [name for name in share.of(jobs) if name not in done]
        _clean(folder, [*missing, share.manifest])
        manifest.save(folder, share.manifest)
        claim(folder / share.manifest, folder / MANIFEST)  # so that everyone sees that the folder is not complete
        with progress or progress_bar() as bar:
            task = bar.add_task(description, total=len(share.of(jobs)), completed=len(share.of(jobs)) - len(missing))
            for info in _results(work, pool, [(folder / name, jobs[name]) for name in missing]):
                manifest.shards.append(info)
                manifest.save(folder, share.manifest)
                bar.advance(task)
        return _conclude(folder, manifest, jobs)


def _is_whole(folder: Path, manifest: Manifest, jobs: Mapping[str, Any]) -> bool:
    """Take down in the manifest what the folder holds; whether nothing is missing."""
    strangers = sorted(path.name for path in folder.glob("*.tar"))  # before the manifests: others may be writing here
    existing = _existing(folder, manifest)
    if strangers and not existing:
        raise DataError(f"{folder}: holds shards of unknown origin ({strangers[0]}, ...); choose another folder")
    manifest.shards = _finished(folder, existing, jobs)
    manifest.complete = len(manifest.shards) == len(jobs) and any(other.complete for other in existing)
    return manifest.complete


@contextmanager
def alone(folder: Path, share: Share) -> Iterator[None]:
    """Let no other program do the same share of the same folder at the same time; a killed one holds no lock.

    Args:
        folder: where both would write; made if need be.
        share: which of the processes that divide the work this is; the others have locks of their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{share.rank:05d}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.warning("%s: another program is writing it; waiting for that", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _results(
    work: Callable[[Path, Any], ShardInfo], pool: SpawnPool | None, calls: list[tuple[Path, Any]]
) -> Iterator[ShardInfo]:
    """What the calls give, as they finish."""
    if pool is None:
        yield from (work(*call) for call in calls)
        return
    futures = [pool.submit(work, *call) for call in calls]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _existing(folder: Path, wanted: Manifest) -> list[Manifest]:
    """The folder's manifest and those of single processes, found to have the wanted parameters."""
    found = []
    for path in (folder / MANIFEST, *sorted(folder.glob(PARTS))):
        manifest = Manifest.load(folder, path.name)  # None where another process has just put them together
        if manifest is not None:
            _check_parameters(folder, manifest, wanted)
            found.append(manifest)
    return found


def _finished(folder: Path, manifests: list[Manifest], jobs: Mapping[str, Any]) -> list[ShardInfo]:
    """The shards that the manifests list, the jobs ask for and the folder holds whole."""
    shards: dict[str, ShardInfo] = {}
    for manifest in manifests:
        wrong = set(manifest.check_files(folder))
        shards |= {shard.name: shard for shard in manifest.shards if shard.name not in wrong and shard.name in jobs}
    return list(shards.values())


def _conclude(folder: Path, manifest: Manifest, jobs: Mapping[str, Any]) -> Manifest:
    """Write the folder's manifest if all shards are there, whoever made them."""
    existing = _existing(folder, manifest)
    manifest.shards = _finished(folder, existing, jobs)
    manifest.complete = len(manifest.shards) == len(jobs)
    if manifest.complete:
        manifest.save(folder)
        for path in folder.glob(PARTS):
            path.unlink(missing_ok=True)
    return manifest


def claim(source: Path, target: Path) -> None:
    """Give a whole file a second name, unless there is something of that name: unlike a rename, it replaces nothing.

    Where the file system has no hard links the second one is a copy, which for a moment is not whole.

    Raises:
        OSError: the target cannot be written.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        content = source.read_bytes()
        with suppress(FileExistsError), target.open("xb") as file:
            file.write(content)


def _clean(folder: Path, names: list[str]) -> None:
    """Remove what a killed process has left of these files."""
    for name in names:
        for path in folder.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


def _check_parameters(folder: Path, existing: Manifest, wanted: Manifest) -> None:
    ours, theirs = {"kind": wanted.kind, **wanted.parameters}, {"kind": existing.kind, **existing.parameters}
    for name in sorted(ours | theirs):
        if ours.get(name) != theirs.get(name):
            raise DataError(
                f"{folder}: was made with {name}={_short(theirs.get(name))}, this run has {name}="
                f"{_short(ours.get(name))}; delete the folder or choose another"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
