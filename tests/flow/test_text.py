"""The interface of the three text flows, and the embedding flow; the discrete path itself is in test_discrete.py."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from univigu.flow.discrete import cross_entropy
from univigu.flow.text import EMBEDDING_TIME_POWER, EmbeddingFlow, MaskFlow, TextFlow, UniformFlow, make_text_flow

V, D = 7, 16


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def token_table() -> torch.Tensor:
    table = torch.randn(V, D, generator=seeded(99))
    return table / table.square().mean(dim=-1, keepdim=True).sqrt()


TABLE = token_table()
EMBEDDING = EmbeddingFlow(V, table=TABLE)
FLOWS: list[TextFlow] = [EMBEDDING, UniformFlow(V), MaskFlow(V)]
each_flow = pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)


@each_flow
def test_path_is_the_source_at_zero_and_the_data_at_one(flow: TextFlow) -> None:
    tokens = torch.randint(V, (2, 50), generator=seeded(0))
    clean = flow.corrupt(tokens, torch.ones(2), seeded(1))
    assert torch.equal(flow.tokens(clean), tokens)
    noisy = flow.corrupt(tokens, torch.zeros(2), seeded(1))
    if isinstance(flow, MaskFlow):
        assert torch.equal(noisy, flow.initial(2, 50))
    else:
        assert float((flow.tokens(noisy) == tokens).float().mean()) < 0.5
    if isinstance(flow, EmbeddingFlow):
        assert torch.equal(noisy, torch.randn(2, 50, D, generator=seeded(1))) and torch.equal(clean, TABLE[tokens])


@each_flow
def test_a_sample_alone_is_what_it_is_in_a_batch(flow: TextFlow) -> None:
    tokens = torch.randint(V, (3, 8), generator=seeded(0))
    logits = torch.randn(3, 8, V, generator=seeded(1))
    t = torch.tensor([0.2, 0.5, 0.8])

    def run(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        generators = [seeded(20 + i) for i in range(3)][rows]
        corrupted = flow.corrupt(tokens[rows], t[rows], generators)
        x = flow.initial(len(generators), 8, generators)
        for now, then in ((0.0, 0.5), (0.5, 1.0)):
            x = flow.step(x, logits[rows], now, then, generators)
        return corrupted, x

    whole = run(slice(None))
    for i in range(3):
        for together, alone in zip(whole, run(slice(i, i + 1)), strict=True):
            assert torch.equal(together[i : i + 1], alone)
    with pytest.raises(ValueError, match="generator: 2 generators for a batch of 3"):
        flow.corrupt(tokens, t, [seeded(0), seeded(1)])


@each_flow
def test_bfloat16_logits_are_raised_to_float32(flow: TextFlow) -> None:
    tokens = torch.randint(V, (2, 40), generator=seeded(0))
    t = torch.tensor([0.3, 0.6])
    x_t = flow.corrupt(tokens, t, seeded(1))
    logits = torch.randn(2, 40, V, generator=seeded(2)).bfloat16()
    expected = flow.loss(logits.float(), x_t, tokens)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = flow.loss(logits, x_t, tokens)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    expected = flow.step(x_t, logits.float(), 0.3, 0.6, seeded(3))
    with torch.autocast("cpu", torch.bfloat16):
        step = flow.step(x_t, logits, 0.3, 0.6, seeded(3))
    assert torch.equal(step, expected) and step.dtype == x_t.dtype != torch.bfloat16


@each_flow
def test_temperature_zero_ends_at_the_likeliest_token(flow: TextFlow) -> None:
    logits = torch.randn(2, 5, V, generator=seeded(0))
    flow = replace(flow, temperature=0.0)
    assert torch.equal(flow.tokens(flow.step(flow.initial(2, 5), logits, 0.5, 1.0)), logits.argmax(-1))


def test_flows_are_built_by_name() -> None:
    assert make_text_flow("embedding", V, top_p=0.5) == EmbeddingFlow(V, top_p=0.5)
    assert make_text_flow("uniform", V, temperature=0.5) == UniformFlow(V, 0.5)
    assert make_text_flow("mask", V, order="confidence") == MaskFlow(V, order="confidence")
    assert EmbeddingFlow(V).bind(SimpleNamespace(token_table=lambda: TABLE)).table is TABLE
    assert MaskFlow(V).bind(None) == MaskFlow(V)


def test_times_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"t: expected one time a sample, \[1\], got \[2\]"):
        MaskFlow(V).corrupt(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(2))


# ---------------------------------------------------------------------- the embedding flow


def test_embedding_loss_is_the_cross_entropy_and_reaches_the_table() -> None:
    table, t = TABLE.clone().requires_grad_(), torch.tensor([0.2, 0.8])
    flow = EmbeddingFlow(V, table=table)
    tokens, head = torch.randint(V, (2, 5), generator=seeded(0)), torch.randn(V, D, generator=seeded(2))
    x_t = flow.corrupt(tokens, t, seeded(1))
    logits = x_t @ head.T
    loss = flow.loss(logits, x_t, tokens)
    torch.testing.assert_close(loss, cross_entropy(logits, tokens))
    loss.sum().backward()
    assert table.grad is not None and float(table.grad.abs().max()) > 1e-3


def test_embedding_step_follows_the_posterior_mean() -> None:
    z, logits = EMBEDDING.initial(2, 9, seeded(1)), torch.randn(2, 9, V, generator=seeded(2))
    mean = logits.softmax(-1) @ TABLE
    torch.testing.assert_close(EMBEDDING.step(z, logits, 0.2, 0.5), z + 0.3 * (mean - z) / 0.8)
    sharp, first = (replace(EMBEDDING, temperature=0.5), replace(EMBEDDING, top_p=1e-6))
    torch.testing.assert_close(sharp.endpoint(logits), (2 * logits).softmax(-1) @ TABLE)
    torch.testing.assert_close(first.endpoint(logits), TABLE[logits.argmax(-1)])
    torch.testing.assert_close(replace(EMBEDDING, temperature=0.0).endpoint(logits), TABLE[logits.argmax(-1)])


def test_embedding_sampler_with_the_true_posterior_gives_the_data() -> None:
    prior = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04, 0.0])
    z, steps = EMBEDDING.initial(1, 5000, seeded(0)), 60
    times = [EMBEDDING.warp(k / steps) for k in range(steps + 1)]
    assert times[30] == pytest.approx(0.5**EMBEDDING_TIME_POWER) and times[-1] == 1.0
    for t, t_next in pairwise(times):  # by Bayes: z_t is normal around t E[x_1] with deviation 1 - t
        squares = (z[..., None, :] - t * TABLE).square().sum(-1)
        z = EMBEDDING.step(z, prior.log() - squares / (2 * (1 - t) ** 2), t, t_next)
    counts = torch.bincount(EMBEDDING.tokens(z)[0], minlength=V) / 5000
    torch.testing.assert_close(counts, prior, rtol=0, atol=0.03)


def test_initial_embeddings_are_standard_normal() -> None:
    noise = EMBEDDING.initial(50, 40, seeded(0))
    assert noise.shape == (50, 40, D) and noise.dtype == torch.float32
    deviation = 1 / math.sqrt(noise.numel())
    assert abs(float(noise.mean())) < 4 * deviation
    assert abs(float(noise.var()) - 1) < 4 * math.sqrt(2) * deviation


def test_tokens_are_read_back_in_float32_inside_autocast() -> None:
    """Rows closer together than bfloat16 can tell apart."""
    table = torch.ones(V, D) + 3e-3 * torch.randn(V, D, generator=seeded(0))
    table = table / table.square().mean(-1, keepdim=True).sqrt()
    tokens = torch.arange(V)[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(EmbeddingFlow(V, table=table).tokens(table[tokens]), tokens)
        assert not torch.equal((table[tokens] @ table.T).argmax(-1), tokens)  # autocast's own product


# ---------------------------------------------------------------------- the mask flow


def test_the_most_certain_tokens_are_revealed_first() -> None:
    flow = MaskFlow(V, temperature=0.0, order="confidence")
    logits = torch.zeros(2, 6, V)
    logits[:, 2:4, 3] = 20.0
    after = flow.step(flow.initial(2, 6), logits, 0.0, 1 / 3)
    assert after.tolist() == [[V, V, 3, 3, V, V]] * 2
    assert int((flow.step(flow.initial(2, 6), torch.zeros(2, 6, V), 0.0, 0.5) == V).sum()) == 6  # half of each
    assert not (flow.step(flow.initial(2, 6), torch.zeros(2, 6, V), 0.0, 1.0) == V).any()


def test_a_text_closes_once_its_end_and_all_before_it_are_revealed() -> None:
    flow, m, eos, pad = MaskFlow(V), V, 1, 0
    x = torch.tensor([[4, 2, eos, m, m], [4, m, eos, m, m], [4, 2, 3, m, m], [4, 2, 3, 2, eos]])
    closed, done = flow.close(x, eos, pad)
    assert closed.tolist() == [[4, 2, eos, pad, pad], [4, m, eos, m, m], [4, 2, 3, m, m], [4, 2, 3, 2, eos]]
    assert not done
    assert flow.close(closed[[0, 3]], eos, pad)[1]
    assert UniformFlow(V).close(x, eos, pad) == (x, False)
