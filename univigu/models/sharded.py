"""Sharded checkpoints, read without running code: torch reads their ``.metadata`` as a plain pickle."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from univigu.models.weights import CheckpointError, reading

CLASSES = {
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata "
    "ChunkStorageMetadata TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "torch": "Size",
    "pathlib": "PosixPath WindowsPath",
    "collections": "OrderedDict",
}
"""What a ``.metadata`` file consists of, besides torch's dtypes: names by module."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in CLASSES.get(module, "").split():
            return super().find_class(module, name)
        raise CheckpointError(f"its .metadata refers to {module}.{name}, which could run code")


def sharded_reader(folder: Path) -> FileSystemReader:
    """torch's reader of a folder, after a check that reading runs no code; a CheckpointError if it would."""
    with reading(folder):
        metadata: Metadata = _Unpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
        for index, info in (metadata.storage_data or {}).items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):  # torch unpickles these
                with (folder / info.relative_path).open("rb") as file:
                    file.seek(info.offset)
                    torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
        return FileSystemReader(folder)
