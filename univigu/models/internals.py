"""Private names of diffusers and accelerate that the models need; a test fails when one of them changes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor


def attention_backend(attn: WanAttention) -> Any:
    """The backend chosen by ``model.set_attention_backend(...)``; None is diffusers' default.

    A ValueError for a processor of another class, which our attention would ignore.
    """
    if type(attn.processor) is not WanAttnProcessor:
        name = type(attn.processor).__name__
        raise ValueError(
            f"set_attn_processor: {name} is not used with text or cached prompts; only pipe(prompt) uses it"
        )
    return attn.processor._attention_backend


def register_block(block: type[torch.nn.Module]) -> None:
    """Tell ``model.enable_cache(...)`` what a block without text returns."""
    TransformerBlockRegistry.register(block, TransformerBlockMetadata(return_hidden_states_index=0))


def execution_device(module: torch.nn.Module) -> torch.device | None:
    """Where accelerate's or diffusers' offloading runs a module; None for a module that is not offloaded."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None and (registry := getattr(module, "_diffusers_hook", None)) is not None:
        group = registry.get_hook("group_offloading")
        device = None if group is None else group.config.onload_device
    return None if device is None else torch.device(device)
