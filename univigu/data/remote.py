"""Shards that lie elsewhere: copied to this machine once, by fsspec (http, s3, gs, hf, ...), and used from there."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from univigu.data.build import progress_bar
from univigu.data.sample import DataError
from univigu.data.shards import MANIFEST, Manifest, sha256_of


def is_remote(place: str | None) -> bool:
    """Whether a place is a URL, such as s3://bucket/data or https://host/data, and not a path."""
    return place is not None and "://" in place


def local_folder(url: str, root: str | Path) -> Path:
    """Where the copy of a URL belongs."""
    return Path(root) / "remote" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def remote_exists(url: str) -> bool:
    """Whether there is a remote folder of shards.

    Raises:
        DataError: it cannot be found out.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url.rstrip("/"))
        return bool(system.exists(f"{path}/{MANIFEST}") or system.exists(path))
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be read ({type(error).__name__}: {error})") from error


def fetch_shards(url: str, folder: Path) -> None:
    """Copy a remote folder of shards; shards that are here already and whole are not copied again.

    A shard appears under its name only when it is whole and, where the remote folder has a manifest, has the checksum
    that the manifest says.  Without a manifest the sizes are compared, and the server must be able to list the folder.

    Raises:
        DataError: the folder cannot be reached or holds no shard, or a shard arrives damaged.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url.rstrip("/"))
        folder.mkdir(parents=True, exist_ok=True)
        manifest = _fetch_manifest(system, path, folder)
        names = _names(system, path) if manifest is None else [shard.name for shard in manifest.shards]
        if not names:
            raise DataError(f"{url}: holds no .tar shard")
        sums = {shard.name: shard.sha256 for shard in manifest.shards} if manifest else {}
        with progress_bar() as progress:
            task = progress.add_task(f"fetching {url}", total=len(names))
            for name in names:
                _fetch(system, f"{path}/{name}", folder / name, sums.get(name))
                progress.advance(task)
        # The manifest comes last: with it the copy is complete.
        staged = folder / f".{MANIFEST}.remote"
        if staged.exists():
            os.replace(staged, folder / MANIFEST)
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{url}: cannot be read ({type(error).__name__}: {error})") from error


def _fetch_manifest(system: Any, path: str, folder: Path) -> Manifest | None:
    if not system.exists(f"{path}/{MANIFEST}"):
        return None
    name = f".{MANIFEST}.remote"
    (folder / name).write_bytes(system.cat_file(f"{path}/{MANIFEST}"))
    return Manifest.load(folder, name)


def _names(system: Any, path: str) -> list[str]:
    found = [str(item).rstrip("/").rpartition("/")[2] for item in system.ls(path, detail=False)]
    return sorted(name for name in set(found) if name.endswith(".tar"))


def _fetch(system: Any, source: str, target: Path, checksum: str | None) -> None:
    if target.exists():
        whole = sha256_of(target) == checksum if checksum else target.stat().st_size == system.size(source)
        if whole:
            return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with system.open(source, "rb") as incoming, temporary.open("wb") as file:
            shutil.copyfileobj(incoming, file, 1 << 22)
        if checksum and sha256_of(temporary) != checksum:
            raise DataError(f"{source}: arrived with another checksum than the manifest says")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
