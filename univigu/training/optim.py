"""AdamW, or Muon for the matrices of the blocks with AdamW for the rest; learning rates belong to the stages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass
class OptimizerOptions:
    """Which optimizer, and its constants."""

    name: Literal["adamw", "muon"] = "adamw"
    """"muon": orthogonalised momentum (torch.optim.Muon) for matrices inside blocks, AdamW for everything else."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay on matrices; vectors and tables are not decayed."""
    fused: bool = False
    """Use torch's fused kernel for AdamW."""
    muon_momentum: float = 0.95
    """Muon's momentum (Nesterov)."""
    muon_rate: float = 4.0
    """Muon's learning rate relative to AdamW's, both counted by the size of an update (``match_rms_adamw``)."""

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer.name={self.name!r}: expected 'adamw' or 'muon'")
        if self.muon_rate <= 0:
            raise ValueError(f"optimizer.muon_rate={self.muon_rate!r}: expected a number over 0")


class BatchedMuon(torch.optim.Muon):
    """torch's Muon (Jordan et al., 2024) that on a CPU orthogonalises in float32, matrices of one shape together.

    torch takes one matrix after the other, in bfloat16.  A CPU without instructions for that type needs fifteen times
    as long for it, most of a training step of a small model.  Elsewhere (a GPU, sharded matrices) torch's is taken.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` computes the loss and gradients."""
        matrices = [p for group in self.param_groups for p in group["params"]]
        if not all(type(p.data) is torch.Tensor and p.device.type == "cpu" for p in matrices):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._averaged(p, group) for p in parameters])
                # As AdamW's updates are, in size: adjust_lr_fn="match_rms_adamw" (Liu et al., 2025, arXiv:2502.16982).
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                options = (group["ns_coefficients"], group["ns_steps"], group["eps"])
                for parameter, update in zip(parameters, orthogonalize(updates, *options), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
        return loss

    def _averaged(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """The gradient in (Nesterov's) running mean, which is kept."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(mean, group["momentum"]) if group["nesterov"] else mean


def orthogonalize(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Matrices [K, M, N] with all their singular values moved to about 1, by Newton-Schulz steps in their own type."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT, coefficients, steps, eps).mT
    a, b, c = coefficients
    result = matrices / matrices.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = result @ result.mT
        result = torch.baddbmm(result, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers that look like one: their groups stand in one list and their state in one table.

    Args:
        muon_groups: groups of matrices, with the options of :class:`torch.optim.Muon`.
        adamw_groups: groups of everything else, with those of :class:`torch.optim.AdamW`.
        fused: see :class:`OptimizerOptions`.
    """

    def __init__(
        self, muon_groups: list[dict[str, Any]], adamw_groups: list[dict[str, Any]], fused: bool = False
    ) -> None:
        self.muon = BatchedMuon(muon_groups, lr=0.0, adjust_lr_fn="match_rms_adamw")  # type: ignore[arg-type]
        self.adamw = torch.optim.AdamW(adamw_groups, lr=0.0, fused=fused)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both work on this optimizer's groups and state."""
        split = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:split], self.param_groups[split:]
        self.muon.state = self.adamw.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both; ``closure`` computes the loss and gradients and is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, for both."""
        super().load_state_dict(state_dict)
        self._share()


def make_optimizer(groups: Mapping[str, Sequence[tuple[str, nn.Parameter]]], options: OptimizerOptions) -> Any:
    """An optimizer whose groups carry a "name", by which stages set their rates, and a "rate" to multiply it with.

    Args:
        groups: named parameters by the name of their learning rate.
        options: see :class:`OptimizerOptions`.
    """
    muon, adamw = [], []
    for name, members in groups.items():
        matrices = [p for n, p in members if options.name == "muon" and is_block_matrix(n, p)]
        taken = {id(p) for p in matrices}
        rest = [p for _, p in members if id(p) not in taken]
        if matrices:
            muon.append(
                {"params": matrices, "name": name, "rate": options.muon_rate, "momentum": options.muon_momentum}
                | {"weight_decay": options.weight_decay}
            )
        for decay, own in (
            (options.weight_decay, [p for p in rest if p.ndim == 2]),
            (0.0, [p for p in rest if p.ndim != 2]),
        ):
            if own:
                adamw.append({"params": own, "name": name, "rate": 1.0, "weight_decay": decay, "betas": options.betas})
    if muon:
        return MuonAdamW(muon, adamw, options.fused)
    return torch.optim.AdamW(adamw, lr=0.0, fused=options.fused)


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a weight matrix inside a repeated block: no embedding, no head, no table."""
    inside = re.search(r"(^|\.)blocks?\.\d+\.", name) is not None
    return inside and parameter.ndim == 2
