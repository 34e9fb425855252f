"""Sharding of the transformer over processes: FSDP2, by block, through Lightning's ModelParallelStrategy.

Each process keeps a shard of the float32 weights and of the optimizer's state. A block's weights are gathered in the
compute dtype when the block runs, and its gradients are reduced in float32.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._pytree import tree_map_only

from univigu.models.lora import LoraOptions, add_lora
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import empty_model, known_options, sharded_reader


def build_sharded(
    build: Callable[[], UniViGUTransformer3DModel],
    lora: LoraOptions | None,
    mesh: DeviceMesh,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> UniViGUTransformer3DModel:
    """A model sharded over a one-dimensional mesh, with the weights of the model that ``build`` returns on rank 0.

    ``lora`` describes that model's adapters. Rank 0 sends one weight at a time, so that the host memory for loading
    does not grow with the number of processes.

    Raises:
        RuntimeError: building failed on rank 0; there the error itself is raised.
    """
    state: dict[str, torch.Tensor] = {}
    message: list[Any] = [None]
    try:
        if dist.get_rank() == 0:  # in host memory
            full_model = build()
            state = full_model.state_dict()
            message = [known_options(UniViGUTransformer3DModel, full_model.config)]
            del full_model  # so that each weight is freed when it is sent
    except Exception as error:
        message = [f"{error.__class__.__name__}: {error}"]
        raise
    finally:
        dist.broadcast_object_list(message, 0)  # also after an error, for which the others must not wait
    if not isinstance(message[0], dict):
        raise RuntimeError(f"rank 0 could not build the model: {message[0]}")
    model = empty_model(UniViGUTransformer3DModel, message[0])
    if lora is not None:
        add_lora(model, lora)
    shard(model, mesh, compute_dtype)
    rope = copy.deepcopy(model.rope)
    model.to_empty(device=device)
    model.rope = rope.to(device)  # its buffers are in no state dict
    with torch.no_grad():
        for name, share in model.state_dict().items():
            full = state.pop(name) if name in state else torch.empty(share.shape, dtype=share.dtype)
            share.copy_(distribute_tensor(full.to(device), share.device_mesh, share.placements))  # sent by rank 0
    return model


def shard(model: UniViGUTransformer3DModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Apply FSDP2: to the blocks, the large tables, the float32 time embedders, then to the rest."""
    # Times must not be rounded, so FSDP2 casts no inputs; cast_inputs casts those that need it.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    embedders = model.condition_embedder.time_embedder, model.time_embedding_t.time_embedder  # float32 in Wan, too
    for module in (*embedders, model.text_head, model):
        module.register_forward_hook(_own_outputs)  # before FSDP2's own hook looks at them
    for module in (*model.blocks, *embedders, model.vocab_embed, model.text_head):
        fully_shard(module, mesh=mesh, mp_policy=exact if module in embedders else policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    def cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Cast latents and prompt embeddings to the compute dtype; times and text states stay as they are."""
        inputs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        if inputs["hidden_states"] is not None:
            inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
        if inputs["encoder_hidden_states"] is not None:
            inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].to(dtype)
        if (text := inputs.get("text")) is not None and text.prompt_embeds is not None:
            inputs["text"] = text._replace(prompt_embeds=text.prompt_embeds.to(dtype))
        return (), inputs

    model.register_forward_pre_hook(cast_inputs, with_kwargs=True)


def _own_outputs(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Copy outputs that are views: FSDP2's hooks on a view would be lost if it were changed in place."""
    return tree_map_only(torch.Tensor, lambda t: t.clone() if t.requires_grad and t._is_view() else t, output)


def trained_weights_changed(model: nn.Module) -> None:
    """Let FSDP2 choose each group's dtypes again, from the weights that are trained now; it chooses only once."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            group._init_mp_dtypes()


def reshard(model: nn.Module) -> None:
    """Free weights that stayed gathered after a forward without a backward, if the model is sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy for FSDP2 only, which also resumes exactly within any stage.

    The weights that have an optimizer state depend on the stages so far; Lightning expects one for each weight that
    is trained at the start.

    Args:
        save_distributed_checkpoint: True: a folder to which every process writes; False: one file, by rank 0.
        compute_dtype: of the gathered weights and of activations. Shards and gradient sums stay float32.
    """

    def __init__(
        self, save_distributed_checkpoint: bool = True, compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    ) -> None:
        if compute_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"strategy.compute_dtype={compute_dtype!r}: expected 'bfloat16' or 'float32'")
        super().__init__("auto", 1, save_distributed_checkpoint)
        self.compute_dtype: torch.dtype = getattr(torch, compute_dtype)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's, with the optimizer state of exactly those weights that were saved with one."""
        path = Path(self.broadcast(checkpoint_path))
        saved = sharded_reader(path).read_metadata().state_dict_metadata if path.is_dir() else {}
        entries = torch.load(path / "meta.pt" if path.is_dir() else path, "cpu", weights_only=True, mmap=True)
        assert self.lightning_module is not None and self.model is not None
        self.lightning_module.on_load_checkpoint(entries)  # says how models differ, where torch would name a key
        stated = {key.rpartition(".")[0].split(".state.", 1)[1] for key in saved if ".state." in key}
        trained = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        try:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in stated if saved else trained[parameter])
            return super().load_checkpoint(path, weights_only=True)
        finally:
            for parameter, required in trained.items():
                parameter.requires_grad_(required)
