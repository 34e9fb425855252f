"""Hashes that say whether two folders hold the same model."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Names of files that decide what a model does; a folder's papers and pictures do not.
DECIDING = (*WEIGHTS, ".json", ".model", ".txt", ".jinja", ".py")
# What a library writes into a config about itself: saving a model anew changes it, the model stays the same.
VOLATILE = ("transformers_version", "_diffusers_version", "_name_or_path")


def folder_fingerprint(folder: str | Path) -> str:
    """A short hash of all a model folder's configs, tokenizers and weights, the same wherever the folder lies.

    It reads every byte (once a process): about a second a gigabyte.
    """
    root = Path(folder)
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix in DECIDING and not _hidden(p, root)]
    state = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _fingerprint(str(root), state)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


@lru_cache(maxsize=32)
def _fingerprint(root: str, state: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in state:
        path = Path(name)
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(_content(path))
    return digest.hexdigest()[:16]


def _content(path: Path) -> bytes:
    if path.suffix == ".json":
        try:
            config = json.loads(path.read_bytes())
        except (UnicodeDecodeError, json.JSONDecodeError):
            return path.read_bytes()
        if isinstance(config, dict):
            config = {key: value for key, value in config.items() if key not in VOLATILE}
        return json.dumps(config, sort_keys=True).encode()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
