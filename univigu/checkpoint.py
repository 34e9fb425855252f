"""Weights in and out: training checkpoints, transformer folders, foundation folders.

Everything is read as safetensors or with ``weights_only=True``, and strictly: a missing or unexpected key is an error
that names it.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.checkpoint import load

from univigu.models.encode import CONVENTIONS
from univigu.models.foundation import COMPONENTS, VOCABULARY, Foundation, vocabulary_of
from univigu.models.lora import LoraOptions, lora_options, merge_lora
from univigu.models.options import ArchitectureOptions, check_replaced
from univigu.models.text import is_text_parameter
from univigu.models.tokens import clean_text
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import (
    CheckpointError,
    WeightDtype,
    check_files,
    dtype_of,
    empty_model,
    known_options,
    load_strictly,
    read_weights,
    reading,
    sharded_reader,
    unreadable,
)

PREFIX = "transformer."
EMA_PREFIX = "ema."  # of callbacks.WeightEMA
SHARDED_PREFIX = "state_dict."  # of weights in a sharded checkpoint, written by Lightning
CHOSEN = ("clean_video_reads_text", "clean_video_reads_prompt", "clean_video_timestep")
"""Options that shape no weight and that a run chooses itself."""
FREE = (*CHOSEN, "text_length", "answer_length", *CONVENTIONS)
"""Options that shape no weight. Those that a run does not choose are taken from the checkpoint."""


def check_checkpoint_file(path: Path) -> None:
    """Refuse what is no checkpoint, or damaged, or could run code; a missing one with the command that makes it."""
    if not path.exists():
        stage = next((name for name in ("foundation", "recall", "refine") if name in path.parts), "recall")
        raise CheckpointError(f"{path}: no such checkpoint; make it with: lightning fit --config configs/{stage}.yaml")
    if path.is_dir():
        sharded_reader(path)
        return
    if not zipfile.is_zipfile(path):  # what torch.save writes
        raise unreadable(path, zipfile.BadZipFile("empty, cut off, or of another format than torch.save's"))
    check_files(path)


def _read_file(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read_sharded(path: Path) -> dict[str, Any]:
    """The full weights that are used of a sharded checkpoint, and its other entries, without the optimizer's state."""
    reader = sharded_reader(path)
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    names = saved_names(path)
    averaged = {PREFIX + name.removeprefix(EMA_PREFIX) for name in names if name.startswith(EMA_PREFIX)}
    state = dict[str, torch.Tensor]()
    for name in sorted(names - averaged):
        entry = entries[SHARDED_PREFIX + name]
        state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    load({"state_dict": state}, storage_reader=reader, no_dist=True)
    return {"state_dict": state} | _read_file(path / "meta.pt")  # written by Lightning


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A training checkpoint: a ``.ckpt`` file, mapped into memory, or the folder of a sharded one, whose full weights
    are read (of averaged weights only the means). A CheckpointError if it is missing or not one of this project's."""
    path = Path(path)
    check_checkpoint_file(path)
    with reading(path):
        checkpoint = (_read_sharded if path.is_dir() else _read_file)(path)
    if not isinstance(checkpoint, dict) or not {"univigu", "state_dict"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: not a checkpoint of this project (it holds no 'univigu' entry)")
    return checkpoint


def load_weights(
    path: str | Path,
    like: Mapping[str, Any] | None = None,
    dtype: WeightDtype = torch.float32,
    checkpoint: dict[str, Any] | None = None,
) -> UniViGUTransformer3DModel:
    """A transformer with the weights of a training checkpoint or of a folder written by ``save_pretrained``.

    It has the checkpoint's architecture, which must be that of the configuration ``like``, if one is given. A
    CheckpointError if the weights are missing, unreadable, or of another architecture; it names the options or keys.

    ``checkpoint`` is the content of a training checkpoint that has been read; its weights are taken out of it.
    """
    folder = Path(path)
    if checkpoint is None and (folder / "config.json").is_file():
        with reading(folder):
            config = dict(UniViGUTransformer3DModel.load_config(folder))
    else:
        checkpoint = checkpoint or read_checkpoint(path)
        config = checkpoint["univigu"]["transformer_config"]
    check_replaced(config, path)
    config = known_options(UniViGUTransformer3DModel, config)
    if like is not None:
        fixed = {name: value for name, value in config.items() if name not in FREE}
        if config.get("token_ids") is not None and like["token_ids"] is None:  # a pruned one is the weights'
            del fixed["vocab_size"], fixed["token_ids"]
        if differing := config_differences(fixed, like):
            raise CheckpointError(f"{path}: made for another model; (checkpoint, configuration) differ in {differing}")
        config |= {name: like[name] for name in CHOSEN}
    model = empty_model(UniViGUTransformer3DModel, config)
    if checkpoint is None:
        load_strictly(model, read_weights(folder), path, dtype=dtype)
        return model
    weights, state = take_usable_weights(checkpoint), dict[str, torch.Tensor]()
    for key in [key for key in weights if key.startswith(PREFIX)]:  # one by one, so that nothing is in memory twice
        name = key.removeprefix(PREFIX)
        state[name] = weights.pop(key).to(dtype_of(model, name, dtype))
    load_strictly(model, state, path)
    return model


def start_weights(
    init_from: str | None, foundation: Foundation, architecture: ArchitectureOptions, dtype: WeightDtype
) -> UniViGUTransformer3DModel:
    """The transformer that training starts from: a foundation's, extended, or weights for the same architecture."""
    start = {"wan": foundation.path, "architecture": architecture, **vocabulary_of(foundation.path)}
    if init_from is None:
        return UniViGUTransformer3DModel.from_wan(**start, torch_dtype=dtype)
    config = UniViGUTransformer3DModel.wan_config(**start)
    if init_from != "random":
        return load_weights(init_from, config, dtype)
    model = UniViGUTransformer3DModel(**config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype_of(model, name, dtype))
    return model


def config_differences(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries that differ from those of another configuration: name -> (given, the other's)."""

    def plain(value: Any) -> Any:  # as read from JSON, where tuples are lists
        return list(value) if isinstance(value, tuple | list) else value

    pairs = {name: (value, other[name]) for name, value in config.items()}
    differing = {name: pair for name, pair in pairs.items() if plain(pair[0]) != plain(pair[1])}
    if "token_ids" in differing:  # too long for a message
        differing["token_ids"] = tuple(ids and f"{len(ids)} ids" for ids in differing["token_ids"])  # type: ignore[assignment]
    return differing


def take_usable_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Take the weights out of a training checkpoint: running means, if it has any, with merged adapters."""
    state = checkpoint.pop("state_dict")
    means = {PREFIX + key.removeprefix(EMA_PREFIX): value for key, value in state.items() if key.startswith(EMA_PREFIX)}
    state = {key: value for key, value in state.items() if not key.startswith(EMA_PREFIX)} | means
    lora = lora_options(checkpoint["univigu"].get("lora"))
    return state if lora is None else merge_lora(state, lora)


def saved_names(path: Path) -> set[str]:
    """Names of the weights in a checkpoint of either kind, such as "transformer.proj_out.bias"; reads none of them."""
    if not path.is_dir():
        return set(_read_file(path)["state_dict"])
    names = sharded_reader(path).read_metadata().state_dict_metadata
    return {name.removeprefix(SHARDED_PREFIX) for name in names if name.startswith(SHARDED_PREFIX)}


def check_resumed(checkpoint: Mapping[str, Any], path: Path, lora: LoraOptions | None, averages: bool) -> None:
    """Raise a MisconfigurationException to resume a fit that trained adapters, or averaged weights, differently.

    ``checkpoint`` is as Lightning gives it to ``on_load_checkpoint``: without the weights if the model is sharded.
    """
    saved = lora_options(checkpoint["univigu"].get("lora"))
    differing: dict[str, Any] = {} if saved == lora else {"model.lora": (saved, lora)}
    names = checkpoint.get("state_dict") or saved_names(path)
    if (averaged := any(name.startswith(EMA_PREFIX) for name in names)) != averages:
        differing["the WeightEMA callback"] = (averaged, averages)
    if differing:
        raise MisconfigurationException(
            f"{path}: (checkpoint, configuration) differ in {differing}; resume with the checkpoint's, or start a new "
            "run from its weights with model.init_from instead of ckpt_path"
        )


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
        except (OSError, RuntimeError) as error:  # torch's, where the disk is full
            kept = "the earlier one is unchanged" if target.exists() else "there is no earlier one"
            raise OSError(f"{target}: the checkpoint could not be written ({error}); {kept}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file or URL without running any code in it, whatever ``weights_only`` says; a file is mapped."""
        with reading(path):
            if "://" not in str(path) and zipfile.is_zipfile(path):
                return _read_file(path)
            return super().load_checkpoint(path, map_location, weights_only=True)


def used_tokens(foundation: Foundation, texts: Iterable[str]) -> list[int]:
    """The tokenizer's ids that texts use, and those that end and pad them, ascending."""
    used = (foundation.tokenizer(clean_text(text))["input_ids"] for text in texts)
    return sorted({foundation.tokenizer.eos_token_id, foundation.pad_token_id}.union(*used))


def prune_foundation(source: str | Path, token_ids: list[int], target: str | Path) -> None:
    """Write a foundation folder whose texts are made of these tokens only: links to the source's, and the list."""
    Foundation(source)  # raises if it is not one
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in (*COMPONENTS, "model_index.json"):
        (Path(target) / name).symlink_to((Path(source) / name).resolve())
    (Path(target) / VOCABULARY).write_text(json.dumps(token_ids))


def prune_model(model: UniViGUTransformer3DModel, token_ids: list[int]) -> UniViGUTransformer3DModel:
    """A model with the rows of these tokens (and the mask state's) of its tables, and the same other tensors."""
    known = list(range(model.config.vocab_size)) if model.config.token_ids is None else model.config.token_ids
    if lacking := sorted(set(token_ids) - set(known)):
        raise CheckpointError(f"the model does not have the tokens {lacking[:10]}")
    rows = torch.searchsorted(torch.tensor(known), torch.tensor(token_ids))
    state = dict(model.state_dict())
    for name in ("vocab_embed.weight", "text_head.linear.weight", "text_head.linear.bias"):
        state[name] = torch.cat([state[name][rows], state[name][len(known) :]])
    config = known_options(UniViGUTransformer3DModel, model.config)
    pruned = empty_model(UniViGUTransformer3DModel, config | {"vocab_size": len(rows), "token_ids": token_ids})
    load_strictly(pruned, state, "transformer")
    return pruned


def to_wan(model: UniViGUTransformer3DModel) -> WanTransformer3DModel:
    """The plain Wan transformer inside a unified one, with the same tensors; the text stream is dropped."""
    wan = empty_model(WanTransformer3DModel, known_options(WanTransformer3DModel, model.config))
    video = {name: value for name, value in model.state_dict().items() if not is_text_parameter(name)}
    load_strictly(wan, video, "transformer")
    return wan


def export_pipeline(transformer: WanTransformer3DModel, foundation: str | Path, target: str | Path) -> None:
    """Write a pipeline's folder: a transformer, and copies of a foundation's other components, which are not loaded.

    It is WanPipeline's if the transformer is Wan's, and so a foundation, else ``univigu.pipeline.UniViGUPipeline``'s.
    """
    source, target = Foundation(foundation).path, Path(target)  # raises if it is not one
    for name in COMPONENTS:
        if name != "transformer":
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
    kind = type(transformer)
    is_wan = kind is WanTransformer3DModel
    index = json.loads((source / "model_index.json").read_text())
    index["_class_name"] = "WanPipeline" if is_wan else "UniViGUPipeline"
    index["transformer"] = ["diffusers" if is_wan else kind.__module__, kind.__name__]
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    transformer.save_pretrained(target / "transformer")
