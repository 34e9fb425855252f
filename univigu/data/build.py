"""Write a folder of shards in parallel, one shard a job; an interrupted run is completed by the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from univigu.data.parts import Parts, check_same_run, locked, read_records
from univigu.data.processes import ONLY, Share, SpawnPool, progress_bar
from univigu.data.sample import DataError
from univigu.data.shards import MANIFEST, Manifest, ShardInfo


def build_folder(
    folder: Path,
    manifest: Manifest,
    jobs: Mapping[str, Any],
    work: Callable[[Path, Any], ShardInfo],
    pool: SpawnPool | None,
    description: str,
    share: Share = ONLY,
    progress: Progress | None = None,
) -> Manifest:
    """Write the shards that are missing or damaged, and the manifest once all are complete.

    Args:
        folder: created if need be.
        manifest: kind and parameters of the result.
        jobs: by the shard's file name, the argument of ``work``; the same in all processes.
        work: writes one shard; a module-level function, if there is a pool.
        pool: runs ``work`` in other processes; None runs it in this one.
        description: text of the progress bar.
        share: which part of the jobs is this process's.
        progress: a bar to use instead of a new one; ``work`` may add tasks to it.

    Returns:
        the manifest; complete unless other processes have shards left to write.

    Raises:
        DataError: the folder holds shards of other parameters, or shards without a manifest.
    """
    if _update(folder, manifest, jobs):  # a complete folder may be read-only
        return manifest
    with locked(folder, f"{share.rank:05d}"), progress or progress_bar() as bar:
        parts = Parts(folder, share)
        with locked(folder):
            if _update(folder, manifest, jobs):  # meanwhile, by another process
                return manifest
            manifest.save(folder)  # says that the folder is not complete
        done = {shard.name for shard in manifest.shards}
        numbers = {name: number for number, name in enumerate(sorted(jobs))}
        names = share.of(sorted(jobs))
        missing = [name for name in names if name not in done]
        for path in (path for name in missing for path in folder.glob(f".{name}.*.tmp")):  # left by a killed process
            path.unlink(missing_ok=True)
        task = bar.add_task(description, total=len(names), completed=len(names) - len(missing))
        for info in _results(work, pool, [(folder / name, jobs[name]) for name in missing]):
            parts.add(numbers[info.name], asdict(info))
            bar.advance(task)
        with locked(folder):
            if not _update(folder, manifest, jobs) and len(manifest.shards) == len(jobs):
                manifest.complete = True
                manifest.save(folder)
                for path in folder.glob(f".{MANIFEST}.*.tmp"):
                    path.unlink(missing_ok=True)
            if manifest.complete:
                parts.clear()
    return manifest


def _update(folder: Path, manifest: Manifest, jobs: Mapping[str, Any]) -> bool:
    """List in the manifest the complete shards of the folder; whether it holds all of them and a complete manifest."""
    # Tars, records, manifest: the order in which others replace one by the next.
    shards, records = sorted(path.name for path in folder.glob("*.tar")), read_records(folder)
    existing = Manifest.load(folder)
    if existing is None:
        if shards:
            raise DataError(f"{folder}: holds shards of unknown origin ({shards[0]}, ...); choose another folder")
        return False
    parameters = {"kind": manifest.kind, **manifest.parameters}
    check_same_run(folder, {"kind": existing.kind, **existing.parameters}, parameters)
    existing.shards += [ShardInfo(**record) for record in records.values()]
    wrong = set(existing.check_files(folder))
    found = {info.name: info for info in existing.shards if info.name in jobs and info.name not in wrong}
    manifest.shards = list(found.values())
    manifest.complete = existing.complete and len(found) == len(jobs)
    return manifest.complete


def _results(
    work: Callable[[Path, Any], ShardInfo], pool: SpawnPool | None, calls: list[tuple[Path, Any]]
) -> Iterator[ShardInfo]:
    """What the calls return, as they finish."""
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
