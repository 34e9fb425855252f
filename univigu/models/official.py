"""Weights in the forms that others write: the official preview's files and Wan's original ones.

An official file is ``{"model": state dict, "step": n}``.  Its keys are ours but for a few names and the prefixes that
wrappers leave; nothing else may differ, and what does is named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file

from univigu.models.conventions import OFFICIAL, Conventions
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import CheckpointError, empty_model, known_options, transformer_folder

ROTARY_KEY = "rotary_emb_text.inv_freq"  # a buffer that the official files store
WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.")
# Official name on the left, ours on the right; every other key is the same.
RENAMED = (
    ("time_embedding_v.time_embedder.", "condition_embedder.time_embedder."),
    ("time_embedding_v.time_proj.", "condition_embedder.time_proj."),
    ("cond_text_embedder.", "condition_embedder.text_embedder."),
    ("scale_shift_table_v", "scale_shift_table"),
    ("video_head.proj_out.", "proj_out."),
)
WAN_HEAD_DIM = 128  # of every Wan model; the weights do not tell
ARCHITECTURE = {"separate_text_ffn": True, "text_attention": "shared", "text_positions": 0}
CONDITIONS = {"clean_video_reads_text": True, "clean_video_timestep": 0, "text_length": 256} | vars(OFFICIAL)
"""What the official model was trained under: no weight tells, so that a file of weights alone loses it."""


def official_name(name: str) -> str:
    """The official preview's name of one of our parameters."""
    for theirs, ours in RENAMED:
        if name.startswith(ours) and (ours.endswith(".") or name == ours):
            return theirs + name[len(ours) :]
    return name


def import_official(
    path: str | Path,
    wan_transformer: str | Path | WanTransformer3DModel,
    text_flow: str = "uniform",
    conventions: Conventions = OFFICIAL,
) -> UniViGUTransformer3DModel:
    """Read a checkpoint of the official preview; nothing in the file is run.

    Args:
        path: its file.
        wan_transformer: the Wan transformer it extends, for the sizes: a folder (its config.json is enough) or a model.
        text_flow: "uniform", the official source of text, or "mask", which the file must hold one more embedding for.
        conventions: how its inputs are made, kept in the model's configuration and honoured wherever it is used.

    Returns:
        the model, in the types the file holds.

    Raises:
        CheckpointError: not such a file; keys that are missing, not understood or of another shape, all named.
        FileNotFoundError: no transformer folder.
    """
    state = strip_wrappers(path, _read_model(path))
    state.pop(ROTARY_KEY, None)
    head = state.get("text_head.linear.weight", state.get("vocab_embed.weight"))
    if head is None:
        raise CheckpointError(f"{path}: missing keys ['text_head.linear.weight', 'vocab_embed.weight']")
    config = _wan_config(wan_transformer) | {"vocab_size": head.shape[0], "text_flow": text_flow} | vars(conventions)
    model = empty_model(UniViGUTransformer3DModel, config)
    names = {official_name(name): name for name in model.state_dict()}
    check_keys(path, state, {theirs: model.get_parameter(ours).shape for theirs, ours in names.items()})
    model.load_state_dict({names[key]: value for key, value in state.items()}, assign=True)
    return model.requires_grad_(True).eval()


def official_differences(model: UniViGUTransformer3DModel) -> dict[str, tuple[Any, Any]]:
    """Options of how a model was trained that are not the official ones: name -> (the model's value, the official)."""
    return _differing(model, CONDITIONS)


def _differing(model: UniViGUTransformer3DModel, official: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (model.config[name], value) for name, value in official.items() if model.config[name] != value}


def check_exportable(model: UniViGUTransformer3DModel, accept_differences: bool = False) -> None:
    """Refuse a model that the official code, or :func:`import_official`, would not run as it was trained.

    Args:
        model: what is to be exported.
        accept_differences: let pass what no weight depends on, see :func:`official_differences`.

    Raises:
        CheckpointError: names each option with its value and the official one.
    """
    if found := _differing(model, ARCHITECTURE):
        raise CheckpointError(f"the official model is another: {_listed(found)}")
    if model.config.text_flow == "embedding":
        raise CheckpointError("text_flow='embedding': the official model's head gives logits")
    differences = official_differences(model)
    if differences and not accept_differences:
        raise CheckpointError(
            f"trained otherwise than the official model, and a file of weights does not tell: {_listed(differences)}; "
            "to export it all the same, --accept-differences (accept_differences=True)"
        )


def _listed(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{n}={ours!r} (official: {official!r})" for n, (ours, official) in differences.items())


def export_official(
    model: UniViGUTransformer3DModel, path: str | Path, step: int = 0, accept_differences: bool = False
) -> None:
    """Write a model as the official preview would; the inverse of :func:`import_official`.

    Args:
        model: a model of the official architecture.
        path: the file to write.
        step: number to store beside the weights.
        accept_differences: write a model, too, that was trained under other conditions than the official one; whoever
            reads the file has to know them (:func:`official_differences`).

    Raises:
        CheckpointError: the model has, or lacks, what the official one does not; each option is named.
    """
    check_exportable(model, accept_differences)
    state = {official_name(name): value.detach().cpu() for name, value in model.state_dict().items()}
    head_dim = model.config.attention_head_dim
    state[ROTARY_KEY] = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    torch.save({"model": state, "step": step}, part)
    os.replace(part, target)


def import_wan(path: str | Path, wan_transformer: str | Path | None = None) -> WanTransformer3DModel:
    """Read Wan's original weights, as Alibaba publishes them, by diffusers' own converter.

    Args:
        path: a .pth or .safetensors file, or a folder of the latter.
        wan_transformer: folder whose config.json gives the sizes; None reads them off the weights.

    Raises:
        CheckpointError: unreadable, or keys that are missing, not understood or of another shape, named.
    """
    state = dict(convert_wan_transformer_to_diffusers(_read_plain(path)))
    missing = [key for key in ("patch_embedding.weight", "proj_out.weight") if key not in state]
    if missing:
        raise CheckpointError(f"{path}: not a Wan transformer: missing keys {missing}")
    config = _wan_config(wan_transformer) if wan_transformer is not None else _infer_config(path, state)
    wan = empty_model(WanTransformer3DModel, config)
    check_keys(path, state, {name: value.shape for name, value in wan.state_dict().items()})
    wan.load_state_dict(state, assign=True)
    return wan.eval()


def check_keys(path: str | Path, state: Mapping[str, torch.Tensor], expected: Mapping[str, Iterable[int]]) -> None:
    """Raise CheckpointError unless a state dict has exactly the expected keys with the expected shapes."""
    problems = {
        "missing keys": sorted(expected.keys() - state.keys()),
        "unexpected keys": sorted(state.keys() - expected.keys()),
        "wrong shapes (file, model)": {
            key: (list(state[key].shape), list(shape))
            for key, shape in expected.items()
            if key in state and list(state[key].shape) != list(shape)
        },
    }
    found = ", ".join(f"{what} {which}" for what, which in problems.items() if which)
    if found:
        raise CheckpointError(f"{path}: weights do not fit: {found}")


def strip_wrappers(path: str | Path, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict without the prefixes that FSDP1 and torch.compile leave in names."""
    stripped: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        for wrapper in WRAPPERS:
            key = key.replace(wrapper, "")
        if key in stripped:
            raise CheckpointError(f"{path}: key {key!r} is there twice, with and without a wrapper's prefix")
        stripped[key] = value
    return stripped


def _read_plain(path: str | Path) -> dict[str, torch.Tensor]:
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if path.is_dir():
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise CheckpointError(f"{path}: no .safetensors file in this folder")
            return {key: value for file in files for key, value in load_file(file).items()}
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # many kinds, from pickle, zip and safetensors alike
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict, found {type(content).__name__}")
    return content


def _read_model(path: str | Path) -> dict[str, torch.Tensor]:
    content = _read_plain(path)
    model = content.get("model")
    if not isinstance(model, dict) or not all(isinstance(value, torch.Tensor) for value in model.values()):
        raise CheckpointError(f"{path}: not a checkpoint of the official preview (it holds no 'model' state dict)")
    return model


def _wan_config(wan: str | Path | WanTransformer3DModel) -> dict[str, Any]:
    config = wan.config if isinstance(wan, WanTransformer3DModel) else None
    if config is None:
        config = WanTransformer3DModel.load_config(transformer_folder(wan))  # type: ignore[arg-type]
    return known_options(WanTransformer3DModel, config)


def _infer_config(path: str | Path, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Sizes of a Wan2.1 text-to-video transformer."""
    patch = state["patch_embedding.weight"]  # [D, C, pt, ph, pw]
    width, patch_size = patch.shape[0], tuple(patch.shape[2:])
    layers = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    sizes = {}
    for name, key, axis in (
        ("ffn_dim", "blocks.0.ffn.net.0.proj.weight", 0),
        ("text_dim", "condition_embedder.text_embedder.linear_1.weight", 1),
        ("freq_dim", "condition_embedder.time_embedder.linear_1.weight", 1),
    ):
        if key not in state:
            raise CheckpointError(f"{path}: not a Wan transformer: missing keys {[key]}")
        sizes[name] = state[key].shape[axis]
    if width % WAN_HEAD_DIM:
        raise CheckpointError(f"{path}: width {width} is no multiple of Wan's head size {WAN_HEAD_DIM}; name a config")
    return sizes | {
        "patch_size": patch_size,
        "num_attention_heads": width // WAN_HEAD_DIM,
        "attention_head_dim": WAN_HEAD_DIM,
        "in_channels": patch.shape[1],
        "out_channels": state["proj_out.weight"].shape[0] // torch.Size(patch_size).numel(),
        "num_layers": max(layers, default=-1) + 1,
    }
