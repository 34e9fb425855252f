"""How checkpoints are written and read: never half a file, and no code from a file."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from univigu.models.weights import unreadable


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, and reads tensors and plain values only.

    Lightning's own writes to the folder of temporary files and moves, which on another file system copies over the old
    checkpoint: a kill or a full disk in that moment would leave neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file; until it is complete and on the disk, the earlier one of this name stays."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError | RuntimeError):  # torch's, where the disk is full
                kept = "the earlier one is unchanged" if target.exists() else "there is no earlier one"
                raise OSError(f"{target}: the checkpoint could not be written ({error}); {kept}") from error
            raise

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file or URL without running any code in it, whatever ``weights_only`` says; a file is mapped."""
        try:
            if "://" not in str(path) and zipfile.is_zipfile(path):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return super().load_checkpoint(path, map_location, weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise unreadable(path, error) from error
