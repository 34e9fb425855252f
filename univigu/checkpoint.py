"""Weights in and out: training checkpoints, transformer folders, foundation folders.

Everything is read as safetensors or with ``weights_only=True``, and strictly: a missing or unexpected key is an error
that names it.
"""

from __future__ import annotations

import inspect
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from lightning import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, not an Exception
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import distribute_tensor

from univigu.models.conventions import CONVENTIONS
from univigu.models.foundation import Foundation
from univigu.models.lora import LoraOptions, is_lora_parameter, lora_differences, lora_options, merge_lora
from univigu.models.official import export_official, import_official, import_wan
from univigu.models.options import check_replaced
from univigu.models.transformer import UniViGUTransformer3DModel, is_text_parameter
from univigu.models.weights import CheckpointError, known_options, load_strictly, unreadable
from univigu.training.parallel import reshard

PREFIX = "transformer."
EMA_PREFIX = "ema."  # of callbacks.WeightEMA
FREE = ("clean_video_reads_text", "clean_video_timestep", "text_length", *CONVENTIONS)
"""Options that shape no weight. A run chooses the first two itself; the others are taken from the checkpoint."""

__all__ = [
    "CheckpointError",
    "averaging_of",
    "check_checkpoint_file",
    "check_resumed",
    "export_foundation",
    "export_official",
    "export_pipeline",
    "import_official",
    "import_wan",
    "load_weights",
    "missing_checkpoint",
    "plain",
    "read_checkpoint",
    "saved_names",
    "take_for_use",
    "take_sharded",
    "to_wan",
    "usable_weights",
]


def missing_checkpoint(path: Path) -> CheckpointError:
    """The error of a checkpoint that has not been made yet; names the command that makes it."""
    stage = next((name for name in ("foundation", "recall", "refine") if name in path.parts), "recall")
    return CheckpointError(f"{path}: no such checkpoint; make it with: lightning fit --config configs/{stage}.yaml")


def _check_folder(path: Path) -> None:
    if path.is_dir() and not (path / ".metadata").is_file():
        raise CheckpointError(f"{path}: not a readable checkpoint (the folder has no .metadata file)")


def check_checkpoint_file(path: Path) -> None:
    """Refuse what cannot be a checkpoint before anything heavy is loaded; cheap for any size."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    _check_folder(path)
    if path.is_file() and not zipfile.is_zipfile(path):  # what torch.save writes
        raise CheckpointError(f"{path}: not a readable checkpoint (empty, cut off, or of another format)")


def _read_sharded(path: Path) -> dict[str, Any]:
    """The full weights of a sharded checkpoint and its other entries, without the optimizer's state."""
    reader = FileSystemReader(path)
    state = {
        name.removeprefix("state_dict."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }
    load({"state_dict": state}, storage_reader=reader, no_dist=True)
    return {"state_dict": state} | _read_file(path / "meta.pt")  # written by Lightning


def _read_file(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint: a ``.ckpt`` file or the folder of a sharded one, whose full weights are read.

    Raises:
        CheckpointError: there is none (says how to make it), or it is not one of this project's.
    """
    path = Path(path)
    if not path.exists():
        raise missing_checkpoint(path)
    _check_folder(path)
    try:
        checkpoint = (_read_sharded if path.is_dir() else _read_file)(path)
    except (Exception, CheckpointException) as error:  # of many types, from pickle, zip and torch
        raise unreadable(path, error) from error
    if not isinstance(checkpoint, dict) or not {"univigu", "state_dict"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: not a checkpoint of this project (it holds no 'univigu' entry)")
    return checkpoint


def load_weights(path: str | Path, like: UniViGUTransformer3DModel | None = None) -> UniViGUTransformer3DModel:
    """A transformer with the weights of a training checkpoint or of a saved transformer folder.

    Args:
        path: ``.ckpt`` file, sharded checkpoint folder, or a folder written by ``save_pretrained``.
        like: a model whose architecture the weights must fit; None takes the checkpoint's own.

    Raises:
        CheckpointError: missing, unreadable, or of another architecture; names the differing options or keys.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        saved = UniViGUTransformer3DModel.from_pretrained(folder)
        if like is None:
            return saved
        config, state = dict(saved.config), saved.state_dict()
    else:
        checkpoint = read_checkpoint(path)
        config, weights = checkpoint["univigu"]["transformer_config"], usable_weights(checkpoint)
        state = {key[len(PREFIX) :]: value for key, value in weights.items() if key.startswith(PREFIX)}
    check_replaced(config, path)
    config = with_defaults(config)
    if like is not None:
        names = [name for name in like.config if not name.startswith("_") and name not in FREE]
        pairs = {name: (config.get(name), like.config[name]) for name in names}
        if differing := {name: pair for name, pair in pairs.items() if plain(pair[0]) != plain(pair[1])}:
            raise CheckpointError(f"{path}: made for another model; (checkpoint, configuration) differ in {differing}")
    model = like if like is not None else UniViGUTransformer3DModel(**config)
    model.register_to_config(**{name: config[name] for name in ("text_length", *CONVENTIONS)})
    load_strictly(model, state, path)
    return model


def usable_weights(checkpoint: Mapping[str, Any], keep_lora: bool = False) -> dict[str, Any]:
    """The weights of a training checkpoint to use: running means, if it has any, and adapters merged unless kept."""
    state = checkpoint["state_dict"]
    means = {PREFIX + key[len(EMA_PREFIX) :]: value for key, value in state.items() if key.startswith(EMA_PREFIX)}
    state = {key: means.get(key, value) for key, value in state.items() if not key.startswith(EMA_PREFIX)}
    lora = lora_options(checkpoint["univigu"].get("lora"))
    return state if lora is None or keep_lora else merge_lora(state, lora)


def saved_names(path: str | Path) -> set[str]:
    """Names of the weights in a checkpoint of either kind, such as "transformer.proj_out.bias"; reads none of them."""
    path = Path(path)
    if path.is_dir():
        start = "state_dict."
        names = FileSystemReader(path).read_metadata().state_dict_metadata
        return {name[len(start) :] for name in names if name.startswith(start)}
    return set(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"])


def check_resumed(
    checkpoint: Mapping[str, Any], path: str | Path, lora: LoraOptions | None, averaging: str | None
) -> None:
    """Refuse to resume a fit that trained adapters, or averaged weights, differently.

    Args:
        checkpoint: as Lightning gives it to ``on_load_checkpoint``; without the weights of a sharded model.
        path: of the checkpoint.
        lora: the configuration's adapters; None trains the weights themselves.
        averaging: the configuration's callback that averages weights, "WeightEMA" or "WeightAveraging" (Lightning's),
            or None.

    Raises:
        MisconfigurationException: names the options, with the checkpoint's and the configuration's values.
    """
    saved = lora_options(checkpoint["univigu"].get("lora"))
    differing: dict[str, tuple[Any, Any]] = {}
    if saved is None or lora is None:
        if saved != lora:
            differing["model.lora"] = (saved, lora)
    else:
        differing |= lora_differences(saved, lora)
    averaged = "WeightAveraging" if "current_model_state" in checkpoint else None
    if any(name.startswith(EMA_PREFIX) for name in checkpoint.get("state_dict") or saved_names(path)):
        averaged = "WeightEMA"
    if averaged != averaging and (averaged, averaging) != (None, "WeightAveraging"):  # which starts from the weights
        differing["the callback that averages weights"] = (averaged, averaging)
    if differing:
        raise MisconfigurationException(
            f"{path}: (checkpoint, configuration) differ in {differing}; resume with the checkpoint's, or start a new "
            "run from its weights with model.init_from instead of ckpt_path"
        )


def averaging_of(module: LightningModule) -> str | None:
    """The callback of a module's trainer that averages weights: "WeightEMA", Lightning's "WeightAveraging", or None."""
    if any(isinstance(callback, WeightAveraging) for callback in module.trainer.callbacks):  # type: ignore[attr-defined]
        return "WeightAveraging"
    return "WeightEMA" if hasattr(module, "ema") else None


def take_for_use(
    model: UniViGUTransformer3DModel, checkpoint: dict[str, Any], lora: LoraOptions | None, rebuild: bool
) -> UniViGUTransformer3DModel:
    """Replace a checkpoint's weights by those to use (:func:`usable_weights`); returns the model to load them into.

    Args:
        model: the present one; it is returned unless the architecture or the adapters differ.
        checkpoint: as Lightning gives it to ``on_load_checkpoint``; changed.
        lora: options of the model's adapters, if it has any. They stay separate only if the checkpoint has the same.
        rebuild: whether the checkpoint has another architecture.
    """
    adapted = any(is_lora_parameter(name) for name, _ in model.named_parameters())
    kept = adapted and not rebuild and lora_options(checkpoint["univigu"].get("lora")) == lora
    checkpoint["state_dict"] = usable_weights(checkpoint, keep_lora=kept)
    if rebuild or (adapted and not kept):
        return UniViGUTransformer3DModel(**checkpoint["univigu"]["transformer_config"])
    return model


@torch.no_grad()
def take_sharded(
    model: torch.nn.Module, checkpoint: Mapping[str, Any], path: str | Path, lora: LoraOptions | None
) -> None:
    """Replace a sharded model's loaded weights by the checkpoint's running means, if it has any; each rank its share.

    Args:
        model: its parameters are all sharded (``training.parallel``).
        checkpoint: without the weights, as Lightning gives it to ``on_load_checkpoint``.
        path: the checkpoint, a folder or a file.
        lora: options of the model's adapters, if it has any.

    Raises:
        MisconfigurationException: the checkpoint's adapters have other options, which are named.
    """
    saved = lora_options(checkpoint["univigu"].get("lora"))
    differing = lora_differences(saved, lora or LoraOptions()) if saved is not None else {}
    if differing:
        raise MisconfigurationException(
            f"{path}: (checkpoint, configuration) differ in {differing}; evaluate with the checkpoint's"
        )
    if not any(name.startswith(EMA_PREFIX) for name in saved_names(path)):
        return
    reshard(model)
    path, weights = Path(path), dict(model.named_parameters())
    if path.is_dir():
        targets = {EMA_PREFIX + name: weight.detach() for name, weight in weights.items()}  # read into the weights
        load({"state_dict": targets}, checkpoint_id=path)
        return
    means = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    for name, weight in weights.items():
        mean = means[EMA_PREFIX + name].to(weight.device)
        weight.copy_(distribute_tensor(mean, weight.device_mesh, weight.placements))  # type: ignore[attr-defined]


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's configuration, with defaults for options that it does not have."""
    parameters = inspect.signature(UniViGUTransformer3DModel).parameters.values()
    defaults = {option.name: option.default for option in parameters if option.default is not option.empty}
    return defaults | known_options(UniViGUTransformer3DModel, config)


def plain(value: Any) -> Any:
    """A configuration value as read from JSON, where tuples are lists."""
    return list(value) if isinstance(value, tuple | list) else value


def to_wan(model: UniViGUTransformer3DModel) -> WanTransformer3DModel:
    """The plain Wan transformer inside a unified one: the text stream is dropped, Wan's weights are copied."""
    wan = WanTransformer3DModel(**known_options(WanTransformer3DModel, model.config))
    state = {k: v for k, v in model.state_dict().items() if not is_text_parameter(k)}
    wan.load_state_dict(state)
    return wan


def export_foundation(checkpoint_path: str | Path, source: str | Path, target: str | Path) -> None:
    """Write a foundation folder: the transformer from a stage-0 checkpoint, everything else from ``source``.

    Raises:
        CheckpointError: see :func:`load_weights`.
    """
    source, target = Path(source), Path(target)
    wan = to_wan(load_weights(checkpoint_path))
    for name in ("tokenizer", "text_encoder", "vae", "scheduler"):
        shutil.copytree(source / name, target / name, dirs_exist_ok=True)
    shutil.copy(source / "model_index.json", target / "model_index.json")
    wan.save_pretrained(target / "transformer")


def export_pipeline(checkpoint_path: str | Path, foundation: str | Path, target: str | Path) -> None:
    """Write a folder for :class:`univigu.pipeline.UniViGUPipeline`: a training checkpoint inside its foundation.

    Raises:
        CheckpointError: see :func:`load_weights`.
        FileNotFoundError: the foundation lacks a component, by name.
    """
    from univigu.pipeline import UniViGUPipeline

    model, parts = load_weights(checkpoint_path), Foundation(foundation)
    pipeline = UniViGUPipeline(parts.tokenizer, parts.text_encoder, parts.vae, parts.scheduler(), model)
    pipeline.save_pretrained(target)
