"""The text's loss in parts: the same numbers as over all logits at once, in a fraction of the memory."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from tests import tiny
from tests.conftest import added_memory, in_fork
from univigu.flow import objective
from univigu.flow.objective import MAX_LOGITS, PerToken, UniFlowBatch, UniFlowObjective
from univigu.flow.text import make_text_flow

VOCAB = 11


@cache
def make_model(flow: str) -> Any:
    return tiny.make_unified(tiny.make_wan(), VOCAB, text_flow=flow)


def measure(flow: str, max_logits: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Text losses of a batch and all gradients."""
    generator = torch.Generator().manual_seed(0)
    batch = UniFlowBatch(
        latents=torch.randn(4, tiny.CHANNELS, 2, 4, 6, generator=generator),
        prompt_embeds=torch.randn(4, 5, tiny.TEXT_DIM, generator=generator),
        null_embeds=torch.randn(1, 5, tiny.TEXT_DIM, generator=generator),
        text_ids=torch.randint(VOCAB, (4, 6), generator=generator),
    )
    model = make_model(flow)
    model.zero_grad(set_to_none=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "MAX_LOGITS", max_logits)
        measured = UniFlowObjective(make_text_flow(flow, VOCAB))
        losses = measured(model, batch, (1, 2, 1), generator=torch.Generator().manual_seed(3))
    (losses.total(4) + (losses.text * torch.tensor([1.0, -2.0, 0.5])).sum()).backward()
    return losses.text.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("flow", ["uniform", "mask", "embedding"])
def test_value_and_gradients_are_those_of_all_logits(flow: str) -> None:
    expected, gradients = measure(flow, 10**9)
    assert len(gradients) > 40
    for max_logits in (1, 7 * VOCAB + 3):
        losses, found = measure(flow, max_logits)
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
        assert found.keys() == gradients.keys()
        for name, value in gradients.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_no_more_logits_exist_than_allowed() -> None:
    tokens, linear, sizes = torch.randint(VOCAB, (2, 5)), nn.Linear(3, VOCAB), []
    linear.register_forward_hook(lambda *args: sizes.append(args[2].numel()))
    for limit in (10 * VOCAB, 10 * VOCAB - 1, 4 * VOCAB, 1):
        loss = PerToken(make_text_flow("uniform", VOCAB).loss, tokens, tokens, limit)
        loss(torch.randn(2, 5, 3), linear)
        assert max(sizes) <= max(limit, VOCAB) and sum(sizes) == 10 * VOCAB
        sizes.clear()


def test_bfloat16_and_autocast() -> None:
    """Many parts in bfloat16 add up as all logits at once do, to its precision."""
    torch.manual_seed(0)
    hidden, tokens, plain = torch.randn(2, 150, 8), torch.randint(20, (2, 150)), nn.Linear(8, 20)

    def gradient(max_logits: int, dtype: torch.dtype, autocast: bool = False) -> torch.Tensor:
        linear = nn.Linear(8, 20, dtype=dtype)
        linear.load_state_dict(plain.state_dict())
        flow = make_text_flow("uniform", 20)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = PerToken(flow.loss, tokens, tokens, max_logits)
            losses = loss(hidden.to(dtype), linear)
        losses.mean().backward()
        assert losses.dtype == torch.float32 and linear.weight.grad is not None and linear.weight.grad.dtype == dtype
        return linear.weight.grad.float()

    exact = gradient(10**9, torch.float32)
    for found in (gradient(200, torch.bfloat16), gradient(200, torch.float32, autocast=True)):
        assert (found - exact).norm() / exact.norm() < 0.02


def wans_loss(limit: int, length: int = 128) -> None:
    """The loss at Wan's vocabulary, and its gradient."""
    torch.manual_seed(0)
    vocab, width = 256384, 16
    flow, linear = make_text_flow("uniform", vocab), torch.nn.Linear(width, vocab)
    hidden = torch.randn(1, length, width, requires_grad=True)
    tokens = torch.randint(vocab, (1, length))
    x_t = flow.corrupt(tokens, torch.full((1,), 0.5))
    linear.weight.grad, linear.bias.grad = torch.zeros(vocab, width), torch.zeros(vocab)
    PerToken(flow.loss, x_t, tokens, limit)(hidden, linear).sum().backward()


@pytest.mark.slow
def test_peak_memory_at_wans_vocabulary() -> None:
    """Resident memory that the loss and its backward add: with the logits in parts under an eighth."""
    weights = 2 * 4 * 256384 * (16 + 1)  # with their gradients
    plain, parts = (
        in_fork(added_memory, partial(wans_loss, limit, 1), partial(wans_loss, limit)) for limit in (10**12, MAX_LOGITS)
    )
    assert 0 < parts - weights < (plain - weights) / 8, (plain, parts)
