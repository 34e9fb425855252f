"""Muon and AdamW as one optimizer: what each moves, and that its state can be saved and taken up again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from univigu.training.optim import MuonAdamW, OptimizerOptions, make_optimizer, orthogonalize


class Net(nn.Module):
    """An embedding, two blocks of a matrix and a bias, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.embed(ids)
        for block in self.blocks:
            states = states + torch.tanh(block(states))
        return self.head(states)


def train(net: Net, optimizers: list[Any], steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        ids, target = (torch.randint(n, (8,), generator=generator) for n in (5, 4))
        loss = nn.functional.cross_entropy(net(ids), target)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def make(net: Net, **options: Any) -> Any:
    optimizer = make_optimizer(net, None, OptimizerOptions(name="muon", **options))
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["rate"]
    return optimizer


def test_it_does_what_the_two_do() -> None:
    ours, theirs = Net(), Net()
    matrices = [block.weight for block in theirs.blocks]
    tables, vectors = [theirs.embed.weight, theirs.head.weight], [theirs.head.bias, *(b.bias for b in theirs.blocks)]
    pair = [
        torch.optim.Muon(matrices, lr=0.04, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": tables}, {"params": vectors, "weight_decay": 0}], lr=0.01, betas=(0.9, 0.95)),
    ]
    optimizer, start = make(ours), Net()
    for step in range(3):
        torch.manual_seed(step)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for each in (optimizer, *pair):
            each.step()
        for a, b, before in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
            assert (a - b).norm() < 0.06 * (b - before).norm()  # torch's Muon is in bfloat16
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True) if a.ndim == 1)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3)])
def test_matrices_of_one_shape_are_orthogonalised_as_torch_does_each(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.stack([scale * torch.randn(shape) for scale in (1e-3, 1.0, 50.0)])
    ours = orthogonalize(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    for single, result in zip(matrices, ours, strict=True):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = single.clone()
        torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
        update = -parameter.detach() / max(1.0, shape[0] / shape[1]) ** 0.5  # torch's default scale of the rate
        assert (result - update).norm() < 0.03 * update.norm()  # bfloat16
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.5 and values.max() < 1.3


def test_matrices_without_a_gradient_rest() -> None:
    net = Net()
    before = [block.weight.clone() for block in net.blocks]
    optimizer = make(net)
    net.blocks[1].weight.square().sum().backward()
    optimizer.step()
    assert torch.equal(net.blocks[0].weight, before[0]) and not torch.equal(net.blocks[1].weight, before[1])


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    net = Net()
    optimizer = make(net)
    train(net, [optimizer], 3)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    expected = train(net, [optimizer], 3, start=3)

    again = Net()
    fresh = make(again)
    again.load_state_dict(saved[0])
    assert train(copy.deepcopy(again), [make(again)], 3, start=3) != expected  # negative control: without the state
    fresh.load_state_dict(saved[1])
    assert train(again, [fresh], 3, start=3) == expected


def test_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    optimizer = make(net)
    assert isinstance(optimizer, MuonAdamW)
    by_kind = [(g["name"], g["rate"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    # Pretrained weights are not decayed; of the text's, matrices are.
    assert by_kind == [("video_muon", 4.0, 0.0, 2), ("video_matrix", 1.0, 0.0, 2), ("video", 1.0, 0.0, 3)]
    plain = make_optimizer(net, None, OptimizerOptions(name="adamw"))
    assert type(plain) is torch.optim.AdamW and [len(g["params"]) for g in plain.param_groups] == [4, 3]
    monkeypatch.setattr("univigu.training.optim.is_text_parameter", lambda name: True)
    text = make_optimizer(net, None, OptimizerOptions())
    assert [g["weight_decay"] for g in text.param_groups] == [0.1, 0.1, 0.0]


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    net, calls = Net(), []
    optimizer = make(net)

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        loss = net(torch.arange(5)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) > 0
    assert calls == [True]


@pytest.mark.parametrize("option", [{"name": "sgd"}, {"learning_rate": 0.0}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="optimizer"):
        OptimizerOptions(**option)
