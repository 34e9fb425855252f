"""Fill a folder with shards in parallel, so that it can be cut off anywhere and completed later."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from univigu.data.sample import DataError
from univigu.data.shards import Manifest, ShardInfo


def _single_thread() -> None:
    import torch

    torch.set_num_threads(1)


class SpawnPool:
    """Processes that are started when the first job comes, so that a run with nothing to do starts none.

    They are spawned and not forked: they decode videos, and decord's threads do not survive a fork.

    Args:
        workers: number of processes; None takes one for every usable core.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers}: expected at least 1")
        self.workers = workers or len(os.sched_getaffinity(0))
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


def build_folder(
    folder: Path,
    manifest: Manifest,
    jobs: Mapping[str, Any],
    work: Callable[[Path, Any], ShardInfo],
    pool: SpawnPool,
    description: str,
) -> Manifest:
    """Write one shard a job and keep the manifest up to date; what is already there and whole stays.

    Args:
        folder: where; made if need be.
        manifest: kind and parameters of the result.
        jobs: by the shard's file name, what ``work`` makes it of.
        work: writes one shard, in another process: a module-level function.
        pool: the processes.
        description: shown beside the progress bar.

    Returns:
        the complete manifest.

    Raises:
        DataError: the folder holds shards of other parameters, or shards without a manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    existing = Manifest.load(folder)
    if existing is None:
        strangers = sorted(path.name for path in folder.glob("*.tar"))
        if strangers:
            raise DataError(f"{folder}: holds shards of unknown origin ({strangers[0]}, ...); choose another folder")
        existing = manifest
    _check_parameters(folder, existing, manifest)
    wrong = set(existing.check_files(folder))
    manifest.shards = [shard for shard in existing.shards if shard.name not in wrong and shard.name in jobs]
    missing = sorted(set(jobs) - {shard.name for shard in manifest.shards})
    if existing.complete and not missing:
        manifest.complete = True
        return manifest
    manifest.save(folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=len(jobs), completed=len(jobs) - len(missing))
        futures = [pool.submit(work, folder / name, jobs[name]) for name in missing]
        try:
            for future in as_completed(futures):
                manifest.shards.append(future.result())
                manifest.save(folder)
                progress.advance(task)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    manifest.complete = True
    manifest.save(folder)
    return manifest


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
