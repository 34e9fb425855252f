"""Numbered jobs whose results go to one folder.  Several processes share them, any of which may be killed.

A job's record ``.parts/NUMBER.json`` is written after its files, and files are replaced atomically.  The process that
finds the records of all jobs writes the merged result.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.progress import Progress

from univigu.data.processes import ONLY, Share, SpawnPool
from univigu.data.progress import LineProgress
from univigu.data.rows import to_json
from univigu.data.sample import DataError
from univigu.data.shards import Manifest, ShardInfo

log = logging.getLogger(__name__)

PARTS = ".parts"
Record = dict[str, Any]
Result = tuple[int, Record, Mapping[str, bytes]]  # a job's number, its record, and its files by name


def locked(folder: Path, name: str = "finish") -> AbstractContextManager[Any]:
    """Acquire a lock of the folder, which is created if need be; the lock of a killed process is released."""
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / PARTS / f"{name}.lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        log.warning("%s: waiting for another process that writes it", folder)
        return lock.acquire()


def check_same_run(folder: Path, existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise DataError that names the first parameter in which the folder's run differs from this one."""
    for name in sorted(existing.keys() | wanted.keys()):
        old, new = existing.get(name), wanted.get(name)
        if old != new:
            message = f"{folder}: was made with {name}={old!r:.80}, this run has {name}={new!r:.80}"
            raise DataError(f"{message}; delete the folder or choose another")


@dataclass(frozen=True)
class Parts:
    """The records of a folder; processes that use it at the same time have different ranks."""

    folder: Path
    rank: int = 0

    def write(self, name: str, data: str | bytes) -> None:
        """Write a file of the folder atomically."""
        path = self.folder / name
        temporary = self.folder / PARTS / f"{self.rank}.tmp"  # not beside the file: benchmarks read whole folders
        for file in (path, temporary):
            file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)

    def add(self, number: int, record: Record) -> None:
        """Add a job's record, after the files that belong to it."""
        self.write(f"{PARTS}/{number:08d}.json", json.dumps(record))

    def records(self) -> dict[int, Record]:
        """The records of all processes by the job's number, in its order."""
        paths = sorted((self.folder / PARTS).glob("*.json"))
        return {int(path.stem): json.loads(path.read_bytes()) for path in paths}

    def clear(self) -> None:
        """Remove all records."""
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)


def run_jobs(
    folder: Path,
    parameters: Mapping[str, Any],
    count: int,
    make: Callable[[Sequence[int]], Iterable[Result]],
    merge: Callable[[list[Record]], Mapping[str, str]],
    batch_size: int = 1,
    share: Share = ONLY,
    description: str = "",
    is_done: Callable[[Record], bool] = lambda record: record["error"] is None,
    progress: Progress | None = None,
) -> list[Record] | None:
    """Do this process's share of the jobs that have no record or one that is not done.

    ``make`` gives the results of a batch of jobs, ``merge`` the files, by name, that are written once all jobs have a
    record.  A folder of other ``parameters`` is a DataError.  Returns all records, or None while some are missing.
    """
    parts = Parts(folder, share.rank)
    with locked(folder, f"{share.rank:05d}"), progress or LineProgress() as bar:
        with locked(folder):
            records, path = parts.records(), folder / PARTS / "parameters"
            if records and path.exists():
                check_same_run(folder, json.loads(path.read_bytes()), json.loads(json.dumps(parameters)))
            parts.write(f"{PARTS}/{path.name}", to_json(parameters))
        done = {number for number, record in records.items() if is_done(record)}
        todo = [number for number in range(share.rank, count, share.world_size) if number not in done]
        task = bar.add_task(description, total=len(todo))
        for start in range(0, len(todo), batch_size):
            for number, record, files in make(todo[start : start + batch_size]):
                for name, data in files.items():
                    parts.write(name, data)
                parts.add(number, record)
                bar.advance(task)
        with locked(folder):
            rows = list(parts.records().values())
            if len(rows) < count:
                return None
            for name, text in merge(rows).items():
                parts.write(name, text)
    return rows


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
        progress: a bar to use instead of a new one; ``work`` may add tasks to it.

    Returns:
        the manifest; complete unless other processes have shards left to write.
    """
    names = sorted(jobs)
    parameters = {"kind": manifest.kind, **manifest.parameters}
    found = Manifest.load(folder)
    if found is not None:
        check_same_run(folder, {"kind": found.kind, **found.parameters}, parameters)
        if found.complete and not found.check_files(folder):  # such a folder may be read-only
            return found
    elif not (folder / PARTS).exists() and (shard := next(folder.glob("*.tar"), None)):
        raise DataError(f"{folder}: holds shards of unknown origin ({shard.name}, ...); choose another folder")

    def make(todo: Sequence[int]) -> Iterator[Result]:
        shards = [names[number] for number in todo]
        for path in (path for name in shards for path in folder.glob(f".{name}.*.tmp")):
            path.unlink(missing_ok=True)  # left by a killed process
        apply = map if pool is None else pool.map
        done = apply(work, [folder / name for name in shards], [jobs[name] for name in shards])
        yield from ((number, asdict(info), {}) for number, info in zip(todo, done, strict=True))

    def merge(records: list[Record]) -> Mapping[str, str]:
        manifest.shards = [ShardInfo(**record) for record in records]
        manifest.complete = not manifest.check_files(folder)
        manifest.save(folder)
        return {}

    def is_done(record: Record) -> bool:
        path = folder / record["name"]
        return path.is_file() and path.stat().st_size == record["num_bytes"]

    with locked(folder):
        manifest.save(folder)  # says that the folder is not complete
    run_jobs(folder, parameters, len(jobs), make, merge, max(1, len(jobs)), share, description, is_done, progress)
    manifest.shards = [ShardInfo(**record) for record in Parts(folder).records().values()]
    return manifest
