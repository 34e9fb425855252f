"""Parameters, operations and memory of a training run, counted on the meta device, where nothing is computed."""

from __future__ import annotations

import json
import weakref
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from univigu.data.buckets import Bucket, Grid
from univigu.flow.objective import UniFlowBatch, UniFlowObjective
from univigu.flow.text import make_text_flow
from univigu.models.foundation import vocabulary_of
from univigu.models.lora import LoraOptions, add_lora, is_lora_parameter
from univigu.models.official import UMT5_VOCAB_SIZE
from univigu.models.text import is_text_parameter
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.models.weights import empty_model, known_options
from univigu.training.optim import OptimizerOptions, freeze_by_rate, is_block_matrix
from univigu.training.stages import Stage

META = torch.device("meta")
WAN21_GRID = Grid(4, 8, (1, 2, 2))
_WAN21 = {"patch_size": WAN21_GRID.patch, "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
_WAN21 |= {"in_channels": 16, "out_channels": 16}
WAN21: dict[str, dict[str, Any]] = {
    "Wan2.1-T2V-1.3B": _WAN21 | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan2.1-T2V-14B": _WAN21 | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
"""Options of the transformers of https://huggingface.co/Wan-AI, by the beginning of their folders' names."""


@dataclass
class Workload:
    """A stage's training step, apart from the machine."""

    transformer: dict[str, Any]
    latents: tuple[int, int, int, int]
    """(C, T, H, W) of a clip."""
    prompt_length: int
    stage: Stage
    batch_size: int = 1  # of a process
    lora: LoraOptions | None = None
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    compute_dtype: torch.dtype = torch.float32
    """Dtype of the weights in use and of the activations."""
    half: bool = False
    """Whether weights that are not trained are bfloat16, without shards: the trainer's precision bf16-true."""
    averaged: bool = False
    """Whether a running mean of the weights is kept."""

    def model(self) -> UniViGUTransformer3DModel:
        """The transformer on the meta device, frozen as in the stage."""
        model = empty_model(UniViGUTransformer3DModel, self.transformer)
        model.rope.to(META)
        if self.lora is not None:
            add_lora(model, self.lora)
        freeze_by_rate(model, self.lora, self.optimizer.rates(self.stage))
        return model.train()

    @property
    def video_tokens(self) -> int:
        patch = self.transformer.get("patch_size", (1, 2, 2))
        return prod(n // p for n, p in zip(self.latents[1:], patch, strict=True))


def workloads_of(args: list[str]) -> dict[str, Workload]:
    """The workload of each stage, by its name, that ``lightning fit`` with these arguments would train.

    Raises:
        FileNotFoundError: the foundation does not exist, and its name is none of Wan2.1's.
    """
    from univigu.training.callbacks import WeightEMA
    from univigu.training.lightning_cli import UniViGUCLI

    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1"]  # not where it will run
    cli = UniViGUCLI([*args, *here], run=False)
    model, data, trainer = cli.model, cli.datamodule, cli.trainer
    half = trainer.precision == "bf16-true"
    transformer, grid = _sizes(Path(model.foundation_path))
    shape = grid.latents_shape(Bucket(data.height, data.width, data.num_frames), "data.")
    return {
        name: Workload(
            known_options(UniViGUTransformer3DModel, transformer | asdict(model.architecture)),
            (transformer["in_channels"], *shape),
            data.prompt_length,
            stage,
            data.batch_size,
            model.lora,
            model.optimizer_options,
            getattr(trainer.strategy, "compute_dtype", torch.bfloat16 if half else torch.float32),  # of ShardedStrategy
            half,
            averaged=any(isinstance(callback, WeightEMA) for callback in trainer.callbacks),  # type: ignore[attr-defined]
        )
        for name, stage in cli.stages.items()
    }


def _sizes(foundation: Path) -> tuple[dict[str, Any], Grid]:
    """The options of a foundation's transformer, with those of its vocabulary, and the grid of its videos."""
    if (file := foundation / "transformer" / "config.json").is_file():
        return json.loads(file.read_text()) | vocabulary_of(foundation), Grid.of(foundation)
    for name, options in WAN21.items():
        if foundation.name.startswith(name):
            return options | {"vocab_size": UMT5_VOCAB_SIZE}, WAN21_GRID
    raise FileNotFoundError(f"foundation={str(foundation)!r}: no such folder, nor one of {', '.join(WAN21)}")


def count_step(work: Workload, checkpointing: bool) -> tuple[float, int]:
    """Of one process's training step, with or without recomputing activations: operations (a multiply and an add are
    two), the mean over the tasks; and the peak bytes besides weights, gradients and the optimizer's state, of the
    costliest task."""
    model = work.model()
    nn.Module.to(model, work.compute_dtype)  # diffusers' own method warns about what the next lines correct
    for embedding in (model.condition_embedder, model.time_embedding_t):
        embedding.time_embedder.float()  # as in training
    if checkpointing:
        model.enable_gradient_checkpointing()
    # The meta device cannot look up which clips are clean; the cost differs by 0.8% of attention.
    model.register_to_config(clean_video_reads_text=True)
    model.register_forward_pre_hook(lambda module, args: (args[0].to(module.dtype), *args[1:]))
    objective = UniFlowObjective(make_text_flow(model.config.text_flow, model.config.vocab_size))
    total, counter, mixture = 0.0, _StepCounter(model), asdict(work.stage.tasks)
    for task in filter(mixture.get, mixture):
        share = mixture[task] / sum(mixture.values())
        size, before = max(1, round(share * work.batch_size)), counter.flops
        prompt = torch.empty(size, work.prompt_length, model.config.text_dim, device=META, dtype=model.dtype)
        ids = torch.zeros(size, work.stage.text_length, dtype=torch.int64, device=META)
        latents = torch.empty(size, *work.latents, device=META)
        batch = UniFlowBatch(latents, prompt, prompt[:1], None if task == "generate" else ids)
        counts = [size * (name == task) for name in mixture]
        with counter, patch(_WAN, _flash_attention), patch(_OURS, _flash_attention):
            loss = objective(model, batch, counts).total(size)
            if loss.requires_grad:
                loss.backward()
            del loss
        model.zero_grad(set_to_none=True)
        total += share * work.batch_size / size * (counter.flops - before)
    return total, counter.peak_bytes


_WAN = "diffusers.models.transformers.transformer_wan.dispatch_attention_fn"
_OURS = "univigu.models.attention.dispatch_attention_fn"


def _flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    """PyTorch's flash attention, which works on the meta device and saves little for its backward."""
    heads_first = (states.transpose(1, 2) for states in (query, key, value))  # [B, heads, S, head_dim]
    return torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)[0].transpose(1, 2)


_FLOPS = flop_registry | {  # four products, without the recomputed scores
    torch.ops.aten._scaled_dot_product_flash_attention_backward: lambda gradient, query, key, value, *_, **__: (
        2 * sdpa_flop_count(query.shape, key.shape, value.shape)
    )
}


class _StepCounter(TorchDispatchMode):
    """Counts operations, and the live bytes of tensors made under it, except gradients of parameters.

    torch's FlopCounterMode keeps activations alive; its MemTracker does not support models with frozen weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flops = self.live_bytes = self.peak_bytes = 0
        weights = (*model.parameters(), *model.buffers())
        self._sizes = {id(weight.untyped_storage()): 0 for weight in weights}  # by storage, which views share
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(self._forget_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := _FLOPS.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for tensor in filter(torch.is_tensor, result if isinstance(result, tuple | list) else (result,)):
            storage = tensor.untyped_storage()
            if id(storage) not in self._sizes:
                self._sizes[id(storage)] = storage.nbytes()
                self.live_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                weakref.finalize(storage, self._free, id(storage))
        return result

    def _free(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)

    def _forget_gradient(self, parameter: torch.Tensor) -> None:
        """Stop counting a parameter's gradient, which ``Plan`` counts separately."""
        key = id(parameter.grad.untyped_storage())  # type: ignore[union-attr]
        self.live_bytes -= self._sizes.get(key, 0)
        self._sizes[key] = 0


@dataclass
class Plan:
    """Numbers of one process, in bytes unless stated otherwise."""

    parameters: int
    """Of the transformer, Wan's and the text stream's."""
    wan_parameters: int
    trained_parameters: int
    flops: float
    """Of a step."""
    weights: int
    """Its float32 shard, or with bf16-true 2 bytes of those not trained; and a running mean if there is one."""
    gathered: int
    """Gathered weights in the compute dtype; 0 in one process that computes in float32."""
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Everything but the frozen text encoder and VAE."""
        return self.weights + self.gathered + self.gradients + self.optimizer + self.activations


def make_plan(work: Workload, world_size: int = 1, checkpointing: bool = False) -> Plan:
    """Count for one of the processes that shard the transformer, with activations recomputed or kept."""
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: expected at least 1")
    model = work.model()
    modules = added_parameters(model).values()
    total, added, trained = (sum(row[i] for row in modules) for i in range(3))
    width = torch.empty(0, dtype=work.compute_dtype).element_size()
    sharded = world_size > 1 or (width < 4 and not work.half)
    weights = 4 * trained + (2 if work.half else 4) * (total - trained)
    states, muon = 0, work.optimizer.name == "muon"  # which keeps one number a weight, AdamW two
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            states += parameter.numel() * (1 if muon and is_block_matrix(name, parameter) else 2)
    flops, activations = count_step(work, checkpointing)
    return Plan(
        parameters=total,
        wan_parameters=total - added,
        trained_parameters=trained,
        flops=flops,
        weights=(weights + 4 * total * work.averaged) // world_size,
        gathered=width * _gathered_numbers(model) if sharded else 0,
        gradients=4 * trained // world_size,
        optimizer=4 * states // world_size,
        activations=activations,
    )


def _gathered_numbers(model: UniViGUTransformer3DModel) -> int:
    """Peak number of gathered weights: the root, and two blocks (one runs, one is prefetched) or the largest table. In
    the backward a block's unreduced gradients count as a third block."""
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    tables = [sum(p.numel() for p in table.parameters()) for table in (model.vocab_embed, model.text_head)]
    root = sum(p.numel() for p in model.parameters()) - len(model.blocks) * block - sum(tables)
    return root + max(3 * block, block + 2 * max(tables))


def added_parameters(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """For each module, with blocks summed: all parameters, those not of Wan, those trained."""
    table: dict[str, tuple[int, int, int]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        module = f"blocks.*.{parts[2]}" if parts[0] == "blocks" else parts[0]
        size, (total, added, trained) = parameter.numel(), table.get(module, (0, 0, 0))
        is_added = is_text_parameter(name) or is_lora_parameter(name)
        table[module] = (total + size, added + size * is_added, trained + size * parameter.requires_grad)
    return table
