"""Write a folder of shards, one shard a job, in worker processes or this one; an interrupted run is continued."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from univigu.data.parts import Parts, Record, Result, check_same_run, locked, run_jobs
from univigu.data.processes import ONLY, Share, SpawnPool
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
        manifest: kind and parameters of the result; a folder of other parameters is a DataError.
        jobs: the argument of ``work`` by the shard's file name, the same in all processes.
        work: writes one shard; picklable if there is a pool.
        share: which part of the jobs is this process's.
        progress: a bar to use instead of a new one; ``work`` may add tasks to it.

    Returns:
        the manifest; complete unless other processes have shards left to write.
    """
    names = sorted(jobs)
    numbers = {name: number for number, name in enumerate(names)}
    parameters = {"kind": manifest.kind, **manifest.parameters}

    def existing() -> Manifest | None:
        found = Manifest.load(folder)
        if found is not None:
            check_same_run(folder, {"kind": found.kind, **found.parameters}, parameters)
        elif shard := next(folder.glob("*.tar"), None):
            raise DataError(f"{folder}: holds shards of unknown origin ({shard.name}, ...); choose another folder")
        return found if found is not None and found.complete else None

    def make(todo: Sequence[int]) -> Iterator[Result]:
        for path in (path for number in todo for path in folder.glob(f".{names[number]}.*.tmp")):
            path.unlink(missing_ok=True)  # left by a killed process
        apply = map if pool is None else pool.map
        paths, arguments = [folder / names[number] for number in todo], [jobs[names[number]] for number in todo]
        yield from (
            (number, asdict(info), {}) for number, info in zip(todo, apply(work, paths, arguments), strict=True)
        )

    def merge(records: list[Record]) -> Mapping[str, str]:
        manifest.shards = [ShardInfo(**record) for record in records]
        manifest.complete = not manifest.check_files(folder)
        manifest.save(folder)
        for path in folder.glob(f".{MANIFEST}.*.tmp"):
            path.unlink(missing_ok=True)
        return {}

    def is_done(record: Record) -> bool:
        path = folder / record["name"]
        return path.is_file() and path.stat().st_size == record["num_bytes"]

    found = existing()
    if found is not None and not found.check_files(folder):  # such a folder may be read-only
        return found
    parts = Parts(folder, share.rank)
    with locked(folder):
        found, records = existing(), parts.records()
        for shard in found.shards if found is not None else ():
            if numbers[shard.name] not in records:  # of a copy without the records
                parts.add(numbers[shard.name], asdict(shard))
        manifest.save(folder)  # says that the folder is not complete
    run_jobs(folder, parameters, len(jobs), make, merge, max(1, len(jobs)), share, description, is_done, progress)
    manifest.shards = [ShardInfo(**record) for record in parts.records().values()]
    return manifest
