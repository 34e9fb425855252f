"""Which weights are trained, and by which optimizer: AdamW, or Muon for the matrices of the blocks with AdamW."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from univigu.models.lora import LoraOptions, is_lora_parameter
from univigu.models.text import is_text_parameter

if TYPE_CHECKING:
    from univigu.training.stages import Stage

WEIGHT_DECAY = {"muon": 0.1, "adamw": 0.01}
"""Decoupled weight decay of the text stream's matrices. Pretrained weights are not decayed."""
SMALL = 2**20
"""Most elements of a matrix that Muon processes together with others on a GPU."""
MUON_RATE = 4.0
"""Muon's learning rate relative to AdamW's, both measured by the size of an update (``match_rms_adamw``)."""


@dataclass
class OptimizerOptions:
    """The optimizer and its learning rates."""

    name: Literal["adamw", "muon"] = "muon"
    """"muon": orthogonalised momentum (torch.optim.Muon) for matrices inside blocks, AdamW for everything else."""
    learning_rate: float = 2e-4
    """Peak learning rate of the pretrained weights, where the stage sets none."""
    text_learning_rate: float = 6e-3
    """Peak learning rate of the text stream's weights, where the stage sets none."""

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer.name={self.name!r}: expected 'adamw' or 'muon'")
        for name in ("learning_rate", "text_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)!r}: expected over 0; a stage's 0 freezes")

    def rates(self, stage: Stage) -> dict[str, float]:
        """Peak learning rates in a stage, by the name of the parameter group."""
        video = self.learning_rate if stage.learning_rate is None else stage.learning_rate
        text = self.text_learning_rate if stage.text_learning_rate is None else stage.text_learning_rate
        return {"video": video, "text": text}


def group_of(name: str, lora: LoraOptions | None) -> str:
    """A parameter's group: "text"; "video", the pretrained weights or their adapters; "" if it is never trained."""
    if is_text_parameter(name):
        return "text"
    return "video" if lora is None or is_lora_parameter(name) else ""


def freeze_by_rate(model: nn.Module, lora: LoraOptions | None, rates: Mapping[str, float]) -> None:
    """Require gradients of exactly those parameters whose group has a learning rate over 0."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates.get(group_of(name, lora), 0.0) > 0)


def trained_and_frozen(model: nn.Module) -> str:
    """How many parameters of which parts are trained at present, and how many are not."""
    counts = {"trained": Counter[str](), "frozen": Counter[str]()}
    for name, parameter in model.named_parameters():
        part = "adapters" if is_lora_parameter(name) else "generator"
        part = "text stream" if is_text_parameter(name) else part
        counts["trained" if parameter.requires_grad else "frozen"][part] += parameter.numel()
    parts = {kind: ", ".join(f"{part} {n / 1e6:.2f} M" for part, n in of.items()) for kind, of in counts.items()}
    return "; ".join(f"{kind}: {text or 'nothing'}" for kind, text in parts.items())


def orthogonalize(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Matrices [K, M, N] with singular values moved to about 1, by Newton-Schulz steps in their own dtype."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT, coefficients, steps, eps).mT
    a, b, c = coefficients
    result = matrices / matrices.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = result @ result.mT
        result = torch.baddbmm(result, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) and AdamW as one optimizer with one list of groups and one state.

    On a CPU, and if they are small, matrices of one shape are orthogonalised together, in float32. torch's Muon, used
    elsewhere and for sharded matrices, processes one after the other in bfloat16, which takes fifteen times as long on
    a CPU without instructions for that type, and on a GPU launches thousands of kernels a step.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
        self.muon = torch.optim.Muon(matrices, lr=0.0, adjust_lr_fn="match_rms_adamw")  # type: ignore[arg-type]
        self.adamw = torch.optim.AdamW(others, lr=0.0)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give both optimizers this one's groups and state."""
        split = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:split], self.param_groups[split:]
        self.muon.state = self.adamw.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both; ``closure`` computes the loss and gradients and is called once."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        matrices = [p for group in self.muon.param_groups for p in group["params"]]
        if all(type(p.data) is torch.Tensor and (p.device.type == "cpu" or p.numel() <= SMALL) for p in matrices):
            self._batched_muon()
        else:
            self.muon.step()
        self.adamw.step()
        return loss

    @torch.no_grad()
    def _batched_muon(self) -> None:
        for group in self.muon.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._averaged(p, group["momentum"]) for p in parameters])
                # As AdamW's updates are, in size: adjust_lr_fn="match_rms_adamw" (Liu et al., 2025, arXiv:2502.16982).
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                options = (group["ns_coefficients"], group["ns_steps"], group["eps"])
                for parameter, update in zip(parameters, orthogonalize(updates, *options), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _averaged(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        """Update the momentum buffer with the gradient; the (Nesterov) average."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        return gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - momentum), momentum)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def make_optimizer(model: nn.Module, lora: LoraOptions | None, options: OptimizerOptions) -> Any:
    """An optimizer whose groups have a "name", up to "_" that of a stage's rate, and a "rate" that multiplies it."""
    muon, adamw = [], []
    groups: dict[str, list[nn.Parameter]] = {a + b: [] for a in ("video", "text") for b in ("_muon", "_matrix", "")}
    for full_name, parameter in model.named_parameters():
        by_muon = options.name == "muon" and is_block_matrix(full_name, parameter)
        if name := group_of(full_name, lora):
            groups[name + ("_muon" if by_muon else "_matrix" if parameter.ndim == 2 else "")].append(parameter)
    for name, params in groups.items():
        decay = WEIGHT_DECAY[options.name] if name.startswith("text_") else 0.0
        group = {"params": params, "name": name, "weight_decay": decay}
        if params and name.endswith("_muon"):
            muon.append(group | {"rate": MUON_RATE})
        elif params:
            adamw.append(group | {"rate": 1.0, "betas": (0.9, 0.95)})
    return MuonAdamW(muon, adamw) if muon else torch.optim.AdamW(adamw, lr=0.0)


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a weight matrix inside a repeated block: no embedding, no head, no table."""
    return name.startswith("blocks.") and parameter.ndim == 2
