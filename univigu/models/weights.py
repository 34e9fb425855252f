"""Taking weights over from folders and from Wan, strictly."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from torch.distributed.tensor import DTensor, Partial

from univigu.models.internals import execution_device

AnyWan = TypeVar("AnyWan", bound=WanTransformer3DModel)


class CheckpointError(ValueError):
    """Weights that are missing, unreadable, or belong to another model."""


def known_options(model: type[WanTransformer3DModel], config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration that are options of a model, without diffusers' private ones."""
    known = inspect.signature(model).parameters
    return {name: value for name, value in config.items() if name in known}


def empty_model(model: type[AnyWan], config: Mapping[str, Any]) -> AnyWan:
    """A model on the meta device: names and shapes of all weights, and no memory; only its buffers are real."""
    with torch.device("meta"):
        made = model(**config)
    options = made.config
    made.rope = type(made.rope)(options.attention_head_dim, options.patch_size, options.rope_max_seq_len)
    return made


def gathered(weight: torch.Tensor) -> torch.Tensor:
    """A sharded weight whole, for use outside its module's forward; its gradients are averaged over the processes."""
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def compute_device(component: torch.nn.Module) -> torch.device:
    """The device a component computes on: its own, or the one that offloading moves its weights to for a call."""
    for module in component.modules():
        if (device := execution_device(module)) is not None:
            return device
    return next(component.parameters()).device


def embedding_rows(embedding: torch.nn.Embedding, count: int) -> torch.Tensor:
    """The first rows of a table, whole also where it is sharded or offloaded."""
    if embedding.weight.is_meta:  # offloaded: it is there while it is called
        return embedding(torch.arange(count, device=compute_device(embedding)))
    return gathered(embedding.weight)[:count]


def check_complete(path: Any, info: dict[str, Any]) -> None:
    """Raise ValueError if diffusers' loading report names a missing, unexpected or mismatched key."""
    problems = {name: info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if problems:
        raise ValueError(f"{path}: weights do not fit: {problems}")


def cast_like(model: WanTransformer3DModel, wan: WanTransformer3DModel) -> None:
    """Give each weight the dtype it has in Wan: a bfloat16 model keeps some in float32, and which may vary."""
    dtypes = {name: parameter.dtype for name, parameter in wan.named_parameters()}
    dtypes |= dict.fromkeys(("scale_shift_table_t", "text_head.norm_final.weight"), dtypes["scale_shift_table"])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, wan.proj_out.weight.dtype))
    model.rope = copy.deepcopy(wan.rope)  # buffers that no state dict holds


def transformer_folder(path: str | Path) -> Path:
    """The transformer's folder, given itself or the pipeline's; FileNotFoundError if there is none."""
    for folder in (Path(path), Path(path) / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"{path}: neither a transformer folder nor a pipeline folder (no config.json found)")
