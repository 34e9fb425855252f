"""Folders of shards: a job writes one shard, and only the process that gives out the jobs writes the manifest."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from univigu.data.progress import LineProgress
from univigu.data.sample import DataError
from univigu.data.shards import Manifest, ShardInfo

log = logging.getLogger(__name__)

Work = Callable[[Path, Any], ShardInfo]
"""Writes the shard of a path, given its job.  The same job gives the same bytes."""
Engine = Callable[[Work, Sequence[Path], Sequence[Any]], Iterable[ShardInfo]]
"""Applies work to paths and jobs like the built-in ``map``, in any order."""


def locked(folder: Path) -> AbstractContextManager[Any]:
    """Acquire the lock of a folder, which is created if need be; the lock of a killed process is released."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        log.warning("%s: waiting for another process that writes it", folder)
        return lock.acquire()


def build_folder(
    folder: Path,
    manifest: Manifest,
    jobs: Mapping[str, Any],
    work: Work,
    engine: Engine = map,
    retry_skipped: bool = False,
) -> Manifest:
    """Write the shards that are missing or damaged, and the complete manifest.

    The manifest lists a shard as soon as it is finished, so that a run that was killed continues.

    Args:
        manifest: kind and parameters of the result; a folder of other parameters is a DataError.
        jobs: the argument of ``work`` by the shard's file name.
        engine: where the jobs run: ``map`` here, a pool's ``map``, or ``univigu.data.engine.RayEngine``.
        retry_skipped: write shards with skipped samples again.
    """
    found, finished = _load(folder, manifest, retry_skipped)
    if found.complete and len(finished) == len(jobs):  # such a folder may be read-only
        return found
    with locked(folder):
        _, manifest.shards = _load(folder, manifest, retry_skipped)  # another process may have written it meanwhile
        manifest.complete = len(manifest.shards) == len(jobs)
        manifest.save(folder)
        names = sorted(jobs.keys() - {shard.name for shard in manifest.shards})
        _remove_temporaries(folder)  # of a killed run
        with LineProgress() as bar:
            task = bar.add_task(f"{folder}: shards", total=len(names))
            for info in engine(work, [folder / name for name in names], [jobs[name] for name in names]):
                manifest.shards.append(info)
                manifest.save(folder)
                bar.advance(task)
        _remove_temporaries(folder)  # of killed workers
        manifest.complete = True
        manifest.save(folder)
    return manifest


def _load(folder: Path, manifest: Manifest, retry_skipped: bool) -> tuple[Manifest, list[ShardInfo]]:
    """The folder's manifest, and those of its shards that need not be written again; a DataError for another run's."""
    found, shard = Manifest.load(folder), next(folder.glob("*.tar"), None)
    if found is None and shard is not None:
        raise DataError(f"{folder}: holds shards of unknown origin ({shard.name}, ...); choose another folder")
    if found is None:
        return manifest, []
    old, new = ({"kind": m.kind, **json.loads(json.dumps(m.parameters))} for m in (found, manifest))
    for name in sorted(old.keys() | new.keys()) if found.shards or shard is not None else ():
        if old.get(name) != new.get(name):
            was, now = (f"{name}={parameters.get(name)!r:.80}" for parameters in (old, new))
            raise DataError(f"{folder}: was made with {was}, this run has {now}; delete the folder or choose another")
    damaged = found.check_files(folder)
    return found, [s for s in found.shards if s.name not in damaged and not (retry_skipped and s.skipped)]


def _remove_temporaries(folder: Path) -> None:
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
