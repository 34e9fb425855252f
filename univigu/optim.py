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
        self.muon = torch.optim.Muon(muon_groups, lr=0.0, adjust_lr_fn="match_rms_adamw")  # type: ignore[arg-type]
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
