"""A long list of independent items, done by several processes that may be killed at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from univigu.data.build import Share, claim
from univigu.data.sample import DataError

PARAMETERS = ".run.json"
ALONE = Share()
"""The only process."""


class Ledger:
    """Which items of a run are done, by files in its folder; processes need nothing else in common.

    Every process appends a row for each item it has finished to a file of its own.  A row that a kill cut off does not
    count, and its item is done again.  What failed is tried again by the next run, too.  Two programs must not keep the
    ledger of one share at once: whoever makes one holds :func:`univigu.data.build.alone` as long as it is in use.

    Args:
        folder: of the run; made if need be.
        parameters: everything the result depends on, as JSON knows it.
        share: which process this is.

    Raises:
        DataError: the folder belongs to a run with other parameters.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any], share: Share = ALONE) -> None:
        self.folder, self.share = folder, share
        folder.mkdir(parents=True, exist_ok=True)
        self._check(json.loads(json.dumps(parameters)))
        self._own = folder / f".rows-{share.rank:05d}.jsonl"
        for path in folder.glob(f".*.{share.rank}-*.tmp"):  # what a kill has left
            path.unlink(missing_ok=True)
        whole = _rows(self._own)
        self.write(self._own.name, "".join(_line(row) for row in whole))

    def _check(self, parameters: dict[str, Any]) -> None:
        path = self.folder / PARAMETERS
        temporary = self._temporary("run")
        temporary.write_text(json.dumps(parameters, indent=1, sort_keys=True) + "\n")
        claim(temporary, path)
        temporary.unlink()
        try:
            there = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); delete the folder or choose another") from error
        if parameters != there and not self.rows():  # a run that failed at once, say for a size that does not fit
            self.write(PARAMETERS, json.dumps(parameters, indent=1, sort_keys=True) + "\n")
            return
        for name in sorted(parameters | there):
            if parameters.get(name) != there.get(name):
                raise DataError(
                    f"{self.folder}: was made with {name}={str(there.get(name))[:80]!r}, this run has "
                    f"{name}={str(parameters.get(name))[:80]!r}; delete the folder or choose another"
                )

    def rows(self) -> dict[str, dict[str, Any]]:
        """The finished items' rows by key, of all processes; one without an error counts more than one with."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(".rows-*.jsonl")):
            for row in _rows(path):
                key = row["key"]
                if key not in found or found[key]["error"] is not None:
                    found[key] = row
        return found

    def missing(self, keys: Iterable[str]) -> list[str]:
        """This process's part of the items that are not done, or failed, in their order."""
        done = {key for key, row in self.rows().items() if row["error"] is None}
        return [key for key in list(keys)[self.share.rank :: self.share.world_size] if key not in done]

    def add(self, key: str, error: str | None = None, **row: Any) -> None:
        """Note that an item is done, or what is wrong with it; files it consists of must be there by now."""
        with self._own.open("a", encoding="utf-8") as file:
            file.write(_line({"key": key, **row, "error": error}))

    def write(self, name: str, data: str | bytes) -> None:
        """Write a file of the run that appears under its name, a path within the folder, when it is whole.

        Until then it lies beside the folder's own files, not in a subfolder: others take all that lies there for whole.
        """
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._temporary("writing")
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)

    def _temporary(self, use: str) -> Path:
        """A name that no other process has; what lies there when the share's next run begins, a kill has left."""
        return self.folder / f".{use}.{self.share.rank}-{os.getpid()}.tmp"

    def results(self, keys: list[str]) -> list[dict[str, Any]] | None:
        """All items' rows in order, or None while other processes have some left to do."""
        rows = self.rows()
        return [rows[key] for key in keys] if all(key in rows for key in keys) else None


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"  # all escaped: nothing in it is a line's end to anyone


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; none if it is not there."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows = []
    for line in text.split("\n")[:-1]:  # what comes after the last line's end was cut off
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "key" in row and "error" in row:
                rows.append(row)
    return rows
