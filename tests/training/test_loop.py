"""The training loop of the small networks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from univigu.training import loop


def test_an_interrupted_loop_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 4)

    def train(state: Path | None, stop: int | None = None) -> tuple[list[int], Tensor]:
        torch.manual_seed(0)
        network, seen = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), []

        def loss_of(step: int) -> Tensor:
            if step == stop:
                raise KeyboardInterrupt
            seen.append(step)
            return (network(torch.randn(2, 3)) - 1).square().mean()

        with suppress(KeyboardInterrupt):
            loop.optimize("network", network, loss_of, 10, 1e-2, state=state)
        return seen, network[0].weight.detach().clone()

    whole, expected = train(None)
    assert whole == list(range(10))
    state = tmp_path / "state.pt"
    assert train(state, stop=6)[0] == list(range(6))
    rest, weights = train(state)
    assert rest == [4, 5, 6, 7, 8, 9] and torch.equal(weights, expected)
    nothing, again = train(state)
    assert nothing == [] and torch.equal(again, expected)
