"""Reading and loading weights, strictly: every key that is missing, unexpected or of another shape is named."""

from __future__ import annotations

import inspect
import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, not an Exception
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from univigu.models.internals import execution_device

AnyWan = TypeVar("AnyWan", bound=WanTransformer3DModel)


class CheckpointError(ValueError):
    """Weights that are missing, unreadable, or belong to another model."""


def unreadable(path: str | Path, error: BaseException) -> CheckpointError:
    """The error for a file or folder that cannot be read, with the first line of its cause."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, pickle.UnpicklingError):  # torch's message advises to run whatever the file holds
        reason = "damaged, of another format than torch.save's, or with objects that are not tensors and could run code"
    if Path(path).suffix.lower() == ".gguf":
        reason = "GGUF is not read; use the model's .safetensors or its folder in diffusers' layout"
    return CheckpointError(f"{path}: not a readable checkpoint ({reason})")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn any error of reading a file, or a folder of a model, into a CheckpointError of one line."""
    try:
        yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # of many types, from pickle, zip, json and safetensors
        raise unreadable(path, error) from error


def check_files(path: Path, subfolders: bool = False) -> None:
    """Raise CheckpointError for a checksum that does not match (safetensors have none), or a file or key that an index
    names and that is not there; of a file of weights, or of a folder."""
    where = "**/" if subfolders else ""
    for file in sorted(path.glob(f"{where}*.bin")) if path.is_dir() else [path]:
        with reading(file):
            if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):
                raise CheckpointError(f"{file}: damaged: the checksum of {damaged} does not match")
    for index in sorted(path.glob(f"{where}*.index*.json")):
        found: set[str] = set()
        with reading(index):
            names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if missing := sorted({file for file in names.values() if not (index.parent / file).is_file()}):
            raise CheckpointError(f"{index}: files that are not there: {missing}")
        if ".safetensors." not in index.name:
            continue
        for file in {index.parent / file for file in names.values()}:
            with reading(file), safe_open(file, "pt") as content:
                found |= set(content.keys())
        if missing := sorted(names.keys() - found):
            raise CheckpointError(f"{index}: keys that no file has: {missing}")


class WeightFiles(Mapping[str, torch.Tensor]):
    """The tensors of .safetensors files; each is mapped into memory when it is asked for, as long as it is used.

    A CheckpointError if files are missing, or if two of them have the same key.
    """

    def __init__(self, path: Path) -> None:
        check_files(path)
        files, single = [path], path / SAFETENSORS_WEIGHTS_NAME
        if index := next(path.glob("*.safetensors.index.json"), None):  # beside it may be variants, which are not read
            files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
        elif path.is_dir():
            files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
        counts = {match[1] for file in files if (match := re.search(r"-of-(\d+)\.safetensors$", file.name))}
        if not files or (path.is_dir() and counts and counts != {f"{len(files):05d}"}):  # also where there is no index
            expected = " or ".join(sorted(counts)) or "some"
            raise CheckpointError(f"{path}: {len(files)} .safetensors files in this folder, expected {expected}")
        self._files: dict[str, Path] = {}
        for file in files:
            with reading(file), safe_open(file, "pt") as content:
                names = set(content.keys())
            if twice := sorted(names & self._files.keys()):
                raise CheckpointError(f"{file}: keys that another file has, too: {twice}")
            self._files |= dict.fromkeys(sorted(names), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        with reading(self._files[name]), safe_open(self._files[name], "pt") as content:
            return content.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_weights(path: str | Path) -> Mapping[str, Any]:
    """What is in a .safetensors file, a folder of such files, or a file of ``torch.save``; nothing in it is run.

    A CheckpointError if there is no such file, or as ``check_files``.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        path = next(path.glob("*.bin"), path)
    if path.is_dir() or path.suffix == ".safetensors":
        return WeightFiles(path)
    check_files(path)
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict, found {type(content).__name__}")
    return content


METADATA_CLASSES = {
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
        if is_dtype or name in METADATA_CLASSES.get(module, "").split():
            return super().find_class(module, name)
        raise CheckpointError(f"its .metadata refers to {module}.{name}, which could run code")


def sharded_reader(folder: Path) -> FileSystemReader:
    """torch's reader of a sharded checkpoint, after a check that reading its pickles runs no code; else a
    CheckpointError."""
    with reading(folder):
        metadata: Metadata = _Unpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
        for index, info in (metadata.storage_data or {}).items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):  # torch unpickles these
                with (folder / info.relative_path).open("rb") as file:
                    file.seek(info.offset)
                    torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
        return FileSystemReader(folder)


WeightDtype = torch.dtype | Callable[[str], torch.dtype]
"""The dtype to load weights in, or a function of a weight's name."""


def dtype_of(model: WanTransformer3DModel, name: str, dtype: WeightDtype) -> torch.dtype:
    """The dtype of one weight: float32 where diffusers keeps it, such as in norms and time embedders."""
    kept = set(model._keep_in_fp32_modules) & set(name.split("."))
    return torch.float32 if kept else dtype if isinstance(dtype, torch.dtype) else dtype(name)


def load_strictly(
    model: WanTransformer3DModel,
    state: Mapping[str, torch.Tensor],
    source: Any,
    names: Mapping[str, str] | None = None,
    dtype: WeightDtype | None = None,
) -> None:
    """Replace weights of a model, usually one on the meta device, by those of a state dict with exactly these keys.

    Weights are read and converted one after the other, so that nothing is in memory twice.

    Args:
        source: what the state dict was read from; a CheckpointError names it and every missing and unexpected key and
            wrong shape.
        names: the name in the state dict of each of the model's weights to load, of which each is a copy. By default
            all by their own names, and what needs no conversion is the state dict's own tensor, if it is in memory.
        dtype: as of ``dtype_of``; None keeps the state dict's.
    """
    own, copy = model.state_dict(), names is not None or isinstance(state, WeightFiles)
    names = {name: name for name in own} if names is None else names
    shapes = {
        theirs: (list(state[theirs].shape), list(own[ours].shape)) for ours, theirs in names.items() if theirs in state
    }
    problems = {
        "missing keys": sorted(set(names.values()) - state.keys()),
        "unexpected keys": sorted(state.keys() - set(names.values())),
        "wrong shapes (file, model)": {name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
    }
    if any(problems.values()):
        found = ", ".join(f"{problem} {keys}" for problem, keys in problems.items() if keys)
        raise CheckpointError(f"{source}: weights do not fit: {found}")
    loaded: dict[str, torch.Tensor] = {}
    for ours, theirs in names.items():
        value = state[theirs]
        loaded[ours] = value.to(value.dtype if dtype is None else dtype_of(model, ours, dtype), copy=copy)
    model.load_state_dict(loaded, strict=False, assign=True)


def check_complete(path: Any, info: Any, allow_unexpected: bool = False) -> None:
    """Raise CheckpointError if a loading report names a missing, unexpected or mismatched key."""
    names = ["missing_keys", "mismatched_keys"] + ["unexpected_keys"] * (not allow_unexpected)
    if problems := {name: sorted(info[name]) for name in names if info[name]}:
        raise CheckpointError(f"{path}: weights do not fit: {problems}")


def load_model(kind: Any, folder: Path, allow_unexpected: bool = False, **options: Any) -> Any:
    """A model of diffusers or transformers from a folder; ``options`` are those of ``from_pretrained``.

    A CheckpointError for what is unreadable or damaged, and for keys that are missing, unexpected or of another shape.
    """
    check_files(folder)
    with reading(folder):
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
        check_complete(folder, info, allow_unexpected)
    return model


def known_options(model: type[WanTransformer3DModel], config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration that are options of a model, in its order, without diffusers' private ones."""
    return {name: config[name] for name in inspect.signature(model).parameters if name in config}


def empty_model(model: type[AnyWan], config: Mapping[str, Any]) -> AnyWan:
    """A model on the meta device: names and shapes of all weights without memory; only its buffers are real."""
    with torch.device("meta"):
        made = model(**config)
    options = made.config
    made.rope = type(made.rope)(options.attention_head_dim, options.patch_size, options.rope_max_seq_len)
    return made


def compute_device(component: torch.nn.Module) -> torch.device:
    """The device a component computes on: its own, or the one that offloading moves its weights to for a call."""
    for module in component.modules():
        if (device := execution_device(module)) is not None:
            return device
    return next(component.parameters()).device


def transformer_folder(path: str | Path) -> Path:
    """The transformer's folder, given itself or the pipeline's; FileNotFoundError if there is none."""
    for folder in (Path(path), Path(path) / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"{path}: neither a transformer folder nor a pipeline folder (no config.json found)")


def wan_options(wan: str | Path | WanTransformer3DModel) -> dict[str, Any]:
    """The options of a Wan transformer, given as a model or as its or its pipeline's folder."""
    if isinstance(wan, WanTransformer3DModel):
        return known_options(WanTransformer3DModel, wan.config)
    with reading(folder := transformer_folder(wan)):
        return known_options(WanTransformer3DModel, WanTransformer3DModel.load_config(folder))
