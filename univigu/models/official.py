"""Weights in others' formats: the official preview's files and Wan's original ones.

An official file is ``{"model": state dict, "step": n}``. Its keys are ours except for a few names and the prefixes of
wrappers; any other difference is an error that names it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from univigu.models.encode import OFFICIAL, Conventions
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import CheckpointError, empty_model, load_strictly, read_weights, wan_options

ROTARY_KEY = "rotary_emb_text.inv_freq"  # a buffer that the official files store
WRAPPERS = r"_fsdp_wrapped_module\.|_orig_mod\."
# Official name on the left, ours on the right; every other key is the same.
RENAMED = (
    ("time_embedding_v.time_embedder.", "condition_embedder.time_embedder."),
    ("time_embedding_v.time_proj.", "condition_embedder.time_proj."),
    ("cond_text_embedder.", "condition_embedder.text_embedder."),
    ("scale_shift_table_v", "scale_shift_table"),
    ("video_head.proj_out.", "proj_out."),
)
UMT5_VOCAB_SIZE = 256384  # of Wan's text encoder
WAN_HEAD_DIM = 128  # of every Wan model; it cannot be read off the weights
WAN_KEYS = (
    "patch_embedding.weight",
    "proj_out.weight",
    "blocks.0.ffn.net.0.proj.weight",
    "condition_embedder.text_embedder.linear_1.weight",
    "condition_embedder.time_embedder.linear_1.weight",
)
"""Weights from which the sizes of a Wan transformer are read."""
ARCHITECTURE = {"separate_text_ffn": True, "text_attention": "shared", "text_positions": 0}
CONDITIONS = {"clean_video_reads_text": True, "clean_video_reads_prompt": True, "clean_video_timestep": 0}
CONDITIONS |= {"text_length": 256} | vars(OFFICIAL)
"""Training conditions of the official model, which a file of weights does not record."""


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
    """Read a checkpoint file of the official preview, in the dtypes of the file; nothing in the file is run.

    A CheckpointError for another file, and for keys that are missing, unexpected or of another shape, all named.

    Args:
        wan_transformer: the Wan transformer it extends, for the sizes: a folder (its config.json is enough) or a model.
        text_flow: "uniform", the official source of text, or "mask", which needs one more embedding in the file.
        conventions: of the model's inputs; recorded in its configuration.
    """
    found = read_weights(path).get("model")
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CheckpointError(f"{path}: not a checkpoint of the official preview (it holds no 'model' state dict)")
    state: dict[str, torch.Tensor] = {}
    for key, value in found.items():
        key = re.sub(WRAPPERS, "", key)
        if key in state:
            raise CheckpointError(f"{path}: key {key!r} is there twice, with and without a wrapper's prefix")
        state[key] = value
    state.pop(ROTARY_KEY, None)
    head = state.get("text_head.linear.weight")
    vocab_size = 1 if head is None else len(head)  # a missing key is named below
    config = wan_options(wan_transformer) | {"vocab_size": vocab_size, "text_flow": text_flow} | vars(conventions)
    model = empty_model(UniViGUTransformer3DModel, config)
    load_strictly(model, state, path, {name: official_name(name) for name in model.state_dict()})
    return model.requires_grad_(True).eval()


def official_differences(
    model: UniViGUTransformer3DModel, official: Mapping[str, Any] = CONDITIONS
) -> dict[str, tuple[Any, Any]]:
    """Options, by default training conditions, that differ: name -> (the model's value, the official one)."""
    return {name: (model.config[name], value) for name, value in official.items() if model.config[name] != value}


def export_official(
    model: UniViGUTransformer3DModel,
    path: str | Path,
    step: int = 0,
    accept_differences: bool = False,
    vocab_size: int = UMT5_VOCAB_SIZE,
) -> None:
    """Write a model, and a number of steps, as the official preview would; the inverse of ``import_official``.

    The tables of a pruned vocabulary become those of all ``vocab_size`` tokens. Those that were left out have
    embeddings of zeros and are never predicted. A CheckpointError names each option of another architecture than the
    official one or, unless ``accept_differences``, of other training conditions, which the file does not record.
    """
    architecture, conditions = official_differences(model, ARCHITECTURE), official_differences(model)
    differing = [f"{name}={a!r} (official: {b!r})" for name, (a, b) in (architecture or conditions).items()]
    if architecture:
        raise CheckpointError(f"not the official architecture: {', '.join(differing)}")
    if model.config.text_flow == "embedding":
        raise CheckpointError("text_flow='embedding': the official model has a discrete text flow")
    if conditions and not accept_differences:
        raise CheckpointError(
            "trained under other conditions than the official model, which the file would not record: "
            f"{', '.join(differing)}; to export it anyway, --accept-differences (accept_differences=True)"
        )
    state = {official_name(name): value.detach().cpu() for name, value in model.state_dict().items()}
    if (ids := model.config.token_ids) is not None:
        tables = {"vocab_embed.weight": 0.0, "text_head.linear.weight": 0.0, "text_head.linear.bias": -1e4}
        for name, unused in tables.items():
            known, mask_state = state[name].tensor_split([len(ids)])
            table = known.new_full((vocab_size, *known.shape[1:]), unused)
            state[name] = torch.cat([table.index_copy(0, torch.tensor(ids), known), mask_state])
    head_dim = model.config.attention_head_dim
    state[ROTARY_KEY] = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    torch.save({"model": state, "step": step}, part)
    os.replace(part, target)


def import_wan(path: str | Path, wan_transformer: str | Path | None = None) -> WanTransformer3DModel:
    """Read Wan's original weights (.pth, .safetensors or a folder of the latter), by diffusers' own converter.

    The sizes are those of the transformer folder, if one is given, and are otherwise read off the weights. A
    CheckpointError for unreadable ones, and for keys that are missing, unexpected or of another shape, all named.
    """
    state = dict(convert_wan_transformer_to_diffusers(dict(read_weights(path))))
    config = _infer_config(path, state) if wan_transformer is None else wan_options(wan_transformer)
    wan = empty_model(WanTransformer3DModel, config)
    load_strictly(wan, state, path)
    return wan.eval()


def _infer_config(path: str | Path, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Sizes of a Wan2.1 text-to-video transformer."""
    if missing := [key for key in WAN_KEYS if key not in state]:
        raise CheckpointError(f"{path}: not a Wan transformer: missing keys {missing}")
    patch, head, ffn, text, time = (state[key] for key in WAN_KEYS)  # patch: [D, C, pt, ph, pw]
    width, patch_size = patch.shape[0], tuple(patch.shape[2:])
    layers = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    if width % WAN_HEAD_DIM:
        raise CheckpointError(f"{path}: width {width} is no multiple of Wan's head size {WAN_HEAD_DIM}; give a config")
    return {
        "patch_size": patch_size,
        "num_attention_heads": width // WAN_HEAD_DIM,
        "attention_head_dim": WAN_HEAD_DIM,
        "in_channels": patch.shape[1],
        "out_channels": head.shape[0] // torch.Size(patch_size).numel(),
        "num_layers": max(layers) + 1,
        "ffn_dim": ffn.shape[0],
        "text_dim": text.shape[1],
        "freq_dim": time.shape[1],
    }
