"""The text's loss in parts: the same numbers as over all logits at once, in a fraction of the memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests import tiny
from univigu.flow.chunked import chunked_scores
from univigu.flow.objective import FlowOptions, UniFlowBatch, UniFlowObjective
from univigu.flow.score import TextScore
from univigu.flow.text import make_text_flow

VOCAB = 11
CASES = [
    ("uniform", "cross_entropy"), ("uniform", "generalized_kl"), ("mask", "cross_entropy"),
    ("mask", "generalized_kl"), ("embedding", "cross_entropy"),
]  # fmt: skip


def make_batch(batch: int = 4, length: int = 6) -> UniFlowBatch:
    generator = torch.Generator().manual_seed(0)
    return UniFlowBatch(
        latents=torch.randn(batch, tiny.CHANNELS, 2, 4, 6, generator=generator),
        prompt_embeds=torch.randn(batch, 5, tiny.TEXT_DIM, generator=generator),
        null_embeds=torch.randn(1, 5, tiny.TEXT_DIM, generator=generator),
        text_ids=torch.randint(VOCAB, (batch, length), generator=generator),
    )


def measure(model: Any, flow: str, kind: str, max_logits: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Text losses of the batch and all gradients."""
    objective = UniFlowObjective(make_text_flow(flow, VOCAB), FlowOptions(max_logits=max_logits))
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(3)
    losses = objective(model, make_batch(), (1, 2, 1), text_loss=kind, generator=generator)
    (losses.total(1.0, 1.0, 4) + (losses.text * torch.tensor([1.0, -2.0, 0.5])).sum()).backward()
    return losses.text.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("flow", "kind"), CASES)
@pytest.mark.parametrize("max_logits", [1, 4 * VOCAB, 7 * VOCAB + 3])
def test_value_and_gradients_are_those_of_all_logits(flow: str, kind: str, max_logits: int) -> None:
    model = tiny.make_unified(tiny.make_wan(), VOCAB, text_flow=flow)
    plain, plain_gradients = measure(model, flow, kind, 10**9)
    parts, gradients = measure(model, flow, kind, max_logits)
    torch.testing.assert_close(parts, plain, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == plain_gradients.keys() and gradients["vocab_embed.weight"].abs().sum() > 0
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_a_loss_that_fits_is_computed_as_ever() -> None:
    """Up to and at the limit the model's head gives logits."""
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    flow = make_text_flow("uniform", VOCAB)
    corrupted = flow.corrupt(tokens, torch.zeros(2))
    fits, over = (TextScore(flow, corrupted, torch.zeros(2), None, "cross_entropy", 10 * VOCAB - n) for n in (0, 1))
    assert fits.reader is None and over.reader == over.read
    logits = torch.randn(2, 5, VOCAB)
    assert torch.equal(fits.losses(logits), flow.loss(logits, corrupted, torch.zeros(2)))


def test_frozen_parts_get_no_gradient() -> None:
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3)
    losses = chunked_scores(hidden, weight, None, lambda logits, rows: logits.square().sum(1), 14)
    losses.sum().backward()
    torch.testing.assert_close(hidden.grad, 2 * hidden.detach() @ weight.T @ weight)
    with torch.no_grad():
        assert not chunked_scores(hidden, weight, None, lambda logits, rows: logits.sum(1), 1).requires_grad


def test_bfloat16_sums_in_float32() -> None:
    """Hundreds of parts in bfloat16 add up as one does; and autocast computes as it would in a linear."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(300, 8), torch.randn(20, 8), torch.randn(20)
    target = torch.randint(20, (300,))

    def gradient(max_logits: int, dtype: torch.dtype, autocast: bool = False) -> torch.Tensor:
        leaf = weight.clone().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = chunked_scores(
                hidden.to(dtype), leaf, bias.to(dtype),
                lambda logits, rows: torch.nn.functional.cross_entropy(logits.float(), target[rows], reduction="none"),
                max_logits,
            )  # fmt: skip
        losses.mean().backward()
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        return leaf.grad.float()

    exact = gradient(10**9, torch.float32)
    error = (gradient(20, torch.bfloat16) - exact).abs().max() / exact.abs().max()
    assert error < 0.01
    assert (gradient(20, torch.float32, autocast=True) - exact).abs().max() / exact.abs().max() < 0.01


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"flow\.max_logits=0"):
        FlowOptions(max_logits=0)


PEAK = """
import resource, sys, torch
from univigu.flow.score import TextScore
from univigu.flow.objective import FlowOptions
from univigu.flow.text import make_text_flow
from tests import tiny
from univigu.models.text import TextHead
way, kind, vocab, length, width = sys.argv[1], sys.argv[2], 256384, 256, 16
torch.manual_seed(0)
flow, head = make_text_flow("uniform", vocab), TextHead(width, vocab)
hidden = torch.randn(1, length, width, requires_grad=True)
shift = scale = torch.zeros(1, 1, width)
tokens, t = torch.randint(vocab, (1, length)), torch.full((1,), 0.5)
corrupted = flow.corrupt(tokens, t)
limit = 10**12 if way == "plain" else FlowOptions().max_logits
score = TextScore(flow, corrupted, t, None, kind, limit)
head.linear.weight.grad, head.linear.bias.grad = torch.zeros(vocab, width), torch.zeros(vocab)
small = TextScore(flow, type(corrupted)(corrupted.x_t[:, :1], tokens[:, :1]), t, None, kind, limit)
small.losses(head(hidden[:, :1], shift, scale, small.reader)).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
score.losses(head(hidden, shift, scale, score.reader)).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, hidden.grad.norm().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cross_entropy", "generalized_kl"])
def test_peak_memory_at_wans_vocabulary(kind: str) -> None:
    """Resident memory that the loss and its backward add, in processes of their own: under an eighth."""

    def run(way: str) -> tuple[float, float]:
        result = subprocess.run([sys.executable, "-c", PEAK, way, kind], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        kilobytes, gradient = map(float, result.stdout.split())
        return kilobytes, gradient

    plain, parts = run("plain"), run("parts")
    print(f"{kind}: plain {plain[0] / 1024:.0f} MiB, in parts {parts[0] / 1024:.0f} MiB")
    assert parts[0] < plain[0] / 8
    assert parts[1] == pytest.approx(plain[1], rel=1e-5)
