"""Private names of diffusers and accelerate: each of these fails when one of them changes."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks._helpers import TransformerBlockRegistry

from tests import tiny
from univigu.models.internals import attention_backend, execution_device, register_block


def test_attention_backend() -> None:
    model = tiny.make_unified(tiny.make_wan())
    assert attention_backend(model.blocks[0].attn1) is None
    model.set_attention_backend("native")
    assert attention_backend(model.blocks[0].attn1) == "native"


def test_blocks_are_registered() -> None:
    class Block(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="not registered"):
        TransformerBlockRegistry.get(Block)
    register_block(Block)
    assert TransformerBlockRegistry.get(Block).return_hidden_states_index == 0


def test_execution_device() -> None:
    module = torch.nn.Linear(1, 1)
    assert execution_device(module) is None
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert execution_device(module) == torch.device("cpu")
