"""Reading and loading weights, strictly: every key that is missing, unexpected or of another shape is named."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Partial

from univigu.models.internals import execution_device

AnyWan = TypeVar("AnyWan", bound=WanTransformer3DModel)


class CheckpointError(ValueError):
    """Weights that are missing, unreadable, or belong to another model."""


def unreadable(path: str | Path, error: BaseException) -> CheckpointError:
    """The error for a file that cannot be read, with the first line of its cause."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return CheckpointError(f"{path}: not a readable checkpoint ({reason})")


def read_weights(path: str | Path) -> dict[str, Any]:
    """The dict in a .safetensors file, a folder of such files, or a file of ``torch.save``; nothing in it is run.

    Raises:
        CheckpointError: no such file, or not one of these.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path}: no .safetensors file in this folder")
    try:
        if files[0].suffix == ".safetensors":
            return {key: value for file in files for key, value in load_file(file).items()}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, from pickle, zip and safetensors
        raise unreadable(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict, found {type(content).__name__}")
    return content


def load_strictly(
    model: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    source: Any,
    names: Mapping[str, str] | None = None,
    assign: bool = False,
) -> None:
    """Load a state dict that has exactly the model's keys and shapes, by copying or by assigning its tensors.

    ``names`` gives the name in the state dict of each of the model's that is to be loaded, by default all by their own
    names. A CheckpointError names ``source`` and every missing and unexpected key and wrong shape.
    """
    parameters = model.state_dict()
    names = {name: name for name in parameters} if names is None else names
    shapes = {theirs: list(parameters[ours].shape) for ours, theirs in names.items()}
    problems = {
        "missing keys": sorted(shapes.keys() - state.keys()),
        "unexpected keys": sorted(state.keys() - shapes.keys()),
        "wrong shapes (file, model)": {
            key: (list(state[key].shape), shape)
            for key, shape in shapes.items()
            if key in state and list(state[key].shape) != shape
        },
    }
    if any(problems.values()):
        found = ", ".join(f"{problem} {keys}" for problem, keys in problems.items() if keys)
        raise CheckpointError(f"{source}: weights do not fit: {found}")
    model.load_state_dict({ours: state[theirs] for ours, theirs in names.items()}, strict=False, assign=assign)


def check_complete(path: Any, info: dict[str, Any]) -> None:
    """Raise CheckpointError if diffusers' loading report names a missing, unexpected or mismatched key."""
    problems = {name: info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if problems:
        raise CheckpointError(f"{path}: weights do not fit: {problems}")


def known_options(model: type[WanTransformer3DModel], config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration that are options of a model, without diffusers' private ones."""
    known = inspect.signature(model).parameters
    return {name: value for name, value in config.items() if name in known}


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


def embedding_rows(embedding: torch.nn.Embedding, count: int) -> torch.Tensor:
    """The first rows of an embedding, also if it is offloaded, or sharded (gradients are averaged over processes)."""
    weight = embedding.weight
    if weight.is_meta:  # offloaded: its weights are there while it is called
        return embedding(torch.arange(count, device=compute_device(embedding)))
    if isinstance(weight, DTensor):
        weight = weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
    return weight[:count]


def cast_like(model: WanTransformer3DModel, wan: WanTransformer3DModel) -> None:
    """Give each weight the dtype it has in Wan: a bfloat16 model keeps some of them in float32."""
    dtypes = {name: parameter.dtype for name, parameter in wan.named_parameters()}
    dtypes |= dict.fromkeys(("scale_shift_table_t", "text_head.norm_final.weight"), dtypes["scale_shift_table"])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, wan.proj_out.weight.dtype))
    model.rope = copy.deepcopy(wan.rope)  # its buffers are in no state dict


def transformer_folder(path: str | Path) -> Path:
    """The transformer's folder, given itself or the pipeline's; FileNotFoundError if there is none."""
    for folder in (Path(path), Path(path) / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"{path}: neither a transformer folder nor a pipeline folder (no config.json found)")
