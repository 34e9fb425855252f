"""Results of numbered, independent jobs in one folder: several processes add them, any of which may be killed.

A job's result is a JSON record ``.parts/NUMBER.json``, written after the files that belong to it.  Files and records
appear under their names only when they are complete.  The process that finds all records present writes the merged
result, under a lock.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from univigu.data.processes import ONLY, Share, progress_bar
from univigu.data.rows import to_json
from univigu.data.sample import DataError

log = logging.getLogger(__name__)

PARTS = ".parts"
Record = dict[str, Any]


@contextmanager
def locked(folder: Path, name: str = "finish") -> Iterator[None]:
    """Hold a lock of the folder, which is created if need be; the lock of a killed process is released."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.warning("%s: waiting for another process that writes it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_same_run(folder: Path, existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise DataError that names the first parameter in which the folder's run differs from this one."""
    for name in sorted(existing.keys() | wanted.keys()):
        if existing.get(name) != wanted.get(name):
            raise DataError(
                f"{folder}: was made with {name}={existing.get(name)!r:.80}, this run has {name}="
                f"{wanted.get(name)!r:.80}; delete the folder or choose another"
            )


def read_records(folder: Path) -> dict[int, Record]:
    """The results in a folder, by the job's number and in its order; none if there is no such folder."""
    records = {}
    for path in sorted((folder / PARTS).glob("*.json")):
        with suppress(FileNotFoundError):  # another process has just merged and removed them
            records[int(path.stem)] = json.loads(path.read_bytes())
    return records


class Parts:
    """The records of a folder.

    Args:
        folder: of the run; created if need be.
        share: which process this is; two processes of the same share exclude each other by :func:`locked`.
    """

    def __init__(self, folder: Path, share: Share = ONLY) -> None:
        self.folder, self.share = folder, share
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        for path in (folder / PARTS).glob(f"{share.rank}-*.tmp"):  # left by a killed process
            path.unlink(missing_ok=True)

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Record what the results depend on, or raise DataError if the folder has results of other parameters."""
        parameters = json.loads(json.dumps(parameters))
        path = self.folder / PARTS / "parameters"
        with locked(self.folder):
            if path.exists() and any((self.folder / PARTS).glob("*.json")):
                check_same_run(self.folder, json.loads(path.read_text()), parameters)
            self.write(f"{PARTS}/parameters", to_json(parameters))

    def write(self, name: str, data: str | bytes) -> None:
        """Write a file of the folder, which appears under its name when it is complete."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not beside the file: benchmarks read every file of their folders.
        temporary = self.folder / PARTS / f"{self.share.rank}-{os.getpid()}.tmp"
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)

    def add(self, number: int, record: Record) -> None:
        """Add a job's result; the files that belong to it must be complete."""
        self.write(f"{PARTS}/{number:08d}.json", json.dumps(record))

    def records(self) -> dict[int, Record]:
        """The results so far, of all processes, by the job's number and in its order."""
        return read_records(self.folder)

    def clear(self) -> None:
        """Remove all records."""
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)


def run_jobs(
    folder: Path,
    parameters: Mapping[str, Any],
    count: int,
    make: Callable[[Sequence[int]], Iterable[tuple[int, Record, Mapping[str, bytes]]]],
    merge: Callable[[list[Record]], Mapping[str, str]],
    batch_size: int = 1,
    share: Share = ONLY,
    description: str = "",
) -> list[Record] | None:
    """Do this process's part of the jobs that are not done, or whose record has an error.

    Args:
        folder: of the run; a second process with the same share waits.
        parameters: what the results depend on.
        count: number of jobs.
        make: gives (number, record, files by name) for each job of a batch; records have an entry "error".
        merge: files by name, given all records; written by each process that finds all of them.

    Returns:
        all records, or None while other processes have jobs left.

    Raises:
        DataError: the folder holds results of other parameters.
    """
    with locked(folder, f"{share.rank:05d}"), progress_bar() as bar:
        parts = Parts(folder, share)
        parts.check(parameters)
        done = {number for number, record in parts.records().items() if record["error"] is None}
        todo = [number for number in share.of(range(count)) if number not in done]
        task = bar.add_task(description, total=len(todo))
        for start in range(0, len(todo), batch_size):
            for number, record, files in make(todo[start : start + batch_size]):
                for name, data in files.items():
                    parts.write(name, data)
                parts.add(number, record)
                bar.advance(task)
        rows = list(parts.records().values())
        if len(rows) < count:
            return None
        for name, text in merge(rows).items():
            parts.write(name, text)
        return rows
