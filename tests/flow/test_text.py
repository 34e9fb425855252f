"""The interface of the three text flows, and the embedding flow; the discrete path itself is in test_discrete.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from univigu.flow.text import (
    EmbeddingFlow,
    MaskFlow,
    TextFlow,
    UniformFlow,
    cross_entropy,
    generalized_kl,
    make_text_flow,
)

V = 7
FLOWS: list[TextFlow] = [EmbeddingFlow(V), UniformFlow(V), MaskFlow(V)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_name(flow: TextFlow) -> str:
    return flow.name


def token_table(width: int = 16) -> torch.Tensor:
    table = torch.randn(V, width, generator=seeded(99))
    return table / table.square().mean(dim=-1, keepdim=True).sqrt()


def test_embedding_loss_is_velocity_error_plus_weighted_entropy() -> None:
    table, t = token_table().requires_grad_(), torch.tensor([0.2, 0.8])
    tokens = torch.randint(V, (2, 5), generator=seeded(0))
    flow = EmbeddingFlow(V, cross_entropy_weight=0.5)
    corrupted = flow.corrupt(tokens, t, table, seeded(1))
    noise, u = corrupted.noise, torch.randn(2, 5, 16, generator=seeded(2))
    assert noise is not None
    error = (u - (table[tokens] - noise)).square().mean(-1)
    time = t[:, None, None]
    endpoint = (1 - time) * noise + time * table[tokens] + (1 - time) * u
    entropy = torch.nn.functional.cross_entropy((endpoint @ table.T / 4).transpose(1, 2), tokens, reduction="none")
    loss = flow.loss(u, corrupted, t, table)
    torch.testing.assert_close(loss, error + 0.5 * entropy)
    # The table learns through the state, the target and the similarity.
    (ours,) = torch.autograd.grad(loss.sum(), table, retain_graph=True)
    (expected,) = torch.autograd.grad((error + 0.5 * entropy).sum(), table, retain_graph=True)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    # At the true velocity the error is gone and the endpoint is the row itself.
    best = flow.loss(table[tokens] - noise, corrupted, t, table)
    torch.testing.assert_close(best, 0.5 * cross_entropy(table[tokens] @ table.T / 4, tokens), rtol=1e-4, atol=1e-5)


def test_embedding_loss_resists_the_collapse_of_the_table() -> None:
    """With all rows alike the velocity error can be 0; the cross-entropy is then log V, and moves the table."""
    same = torch.ones(V, 16).requires_grad_()
    flow, t = EmbeddingFlow(V), torch.tensor([0.5])
    tokens = torch.arange(5)[None]
    corrupted = flow.corrupt(tokens, t, same, seeded(0))
    assert corrupted.noise is not None
    loss = flow.loss((1 - corrupted.noise), corrupted, t, same)
    torch.testing.assert_close(loss, torch.full((1, 5), math.log(V)))
    loss.sum().backward()
    assert same.grad is not None and float(same.grad.abs().max()) > 0.1


@pytest.mark.parametrize("flow", FLOWS, ids=by_name)
def test_path_is_the_source_at_zero_and_the_data_at_one(flow: TextFlow) -> None:
    table = token_table() if flow.needs_table else None
    tokens = torch.randint(V, (2, 50), generator=seeded(0))
    clean = flow.corrupt(tokens, torch.ones(2), table, seeded(1))
    assert torch.equal(flow.tokens(clean.x_t, table), tokens)
    assert torch.equal(clean.tokens, tokens)
    noisy = flow.corrupt(tokens, torch.zeros(2), table, seeded(1))
    if isinstance(flow, MaskFlow):
        assert torch.equal(noisy.x_t, flow.initial(2, 50))
    else:
        assert float((flow.tokens(noisy.x_t, table) == tokens).float().mean()) < 0.5
    if table is not None:
        assert noisy.noise is not None and torch.equal(noisy.x_t, noisy.noise)
        assert torch.equal(clean.x_t, table[tokens])


def test_initial_embeddings_are_standard_normal() -> None:
    noise = EmbeddingFlow(V).initial(50, 40, token_table(), seeded(0))
    assert noise.shape == (50, 40, 16) and noise.dtype == torch.float32
    deviation = 1 / math.sqrt(noise.numel())
    assert abs(float(noise.mean())) < 4 * deviation
    assert abs(float(noise.var()) - 1) < 4 * math.sqrt(2) * deviation


def test_embedding_sampler_follows_the_velocity_to_the_text() -> None:
    table, flow = token_table(), EmbeddingFlow(V)
    tokens = torch.randint(V, (2, 9), generator=seeded(0))
    z = noise = flow.initial(2, 9, table, seeded(1))
    assert not torch.equal(flow.tokens(z, table), tokens)
    for t, t_next in ((0.0, 0.2), (0.2, 0.7), (0.7, 1.0)):
        z = flow.step(z, table[tokens] - noise, t, t_next, table)
        torch.testing.assert_close(z, (1 - t_next) * noise + t_next * table[tokens], rtol=0, atol=1e-6)
    assert torch.equal(flow.tokens(z, table), tokens)
    with pytest.raises(ValueError, match="t, t_next: must satisfy"):
        flow.step(z, z, 0.5, 0.4)


@pytest.mark.parametrize("flow", FLOWS, ids=by_name)
def test_a_sample_alone_is_what_it_is_in_a_batch(flow: TextFlow) -> None:
    table = token_table() if flow.needs_table else None
    width = 16 if flow.needs_table else V
    tokens = torch.randint(V, (3, 8), generator=seeded(0))
    output = torch.randn(3, 8, width, generator=seeded(1))
    t = torch.tensor([0.2, 0.5, 0.8])

    def run(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        generators = [seeded(20 + i) for i in range(3)][rows]
        corrupted = flow.corrupt(tokens[rows], t[rows], table, generators).x_t
        x = flow.initial(len(generators), 8, table, generators)
        for now, then in ((0.0, 0.5), (0.5, 1.0)):
            x = flow.step(x, output[rows], now, then, table, generators)
        return corrupted, x

    whole = run(slice(None))
    for i in range(3):
        for together, alone in zip(whole, run(slice(i, i + 1)), strict=True):
            assert torch.equal(together[i : i + 1], alone)
    with pytest.raises(ValueError, match="generator: 2 generators for a batch of 3"):
        flow.corrupt(tokens, t, table, [seeded(0), seeded(1)])


@pytest.mark.parametrize("flow", FLOWS, ids=by_name)
def test_bfloat16_outputs_are_raised_to_float32(flow: TextFlow) -> None:
    table = token_table() if flow.needs_table else None
    tokens = torch.randint(V, (2, 40), generator=seeded(0))
    t = torch.tensor([0.3, 0.6])
    corrupted = flow.corrupt(tokens, t, table, seeded(1))
    output = torch.randn(2, 40, 16 if flow.needs_table else V, generator=seeded(2)).bfloat16()
    kinds = ["cross_entropy"] if flow.needs_table else ["cross_entropy", "generalized_kl"]
    for kind in kinds:
        expected = flow.loss(output.float(), corrupted, t, table, kind)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = flow.loss(output, corrupted, t, table, kind)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    step = flow.step(corrupted.x_t, output, 0.3, 0.6, table, seeded(3))
    assert torch.equal(step, flow.step(corrupted.x_t, output.float(), 0.3, 0.6, table, seeded(3)))
    assert step.dtype == corrupted.x_t.dtype != torch.bfloat16


def test_tokens_are_read_back_in_float32_inside_autocast() -> None:
    """Rows closer together than bfloat16 can tell apart."""
    table = torch.ones(V, 16) + 3e-3 * torch.randn(V, 16, generator=seeded(0))
    table = table / table.square().mean(-1, keepdim=True).sqrt()
    tokens = torch.arange(V)[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(EmbeddingFlow(V).tokens(table[tokens], table), tokens)
        assert not torch.equal((table[tokens] @ table.T).argmax(-1), tokens)  # what autocast makes of it


def test_flows_are_built_by_name() -> None:
    assert make_text_flow("embedding", V, cross_entropy_weight=2.0) == EmbeddingFlow(V, 2.0)
    assert make_text_flow("uniform", V, exponent=2.0) == UniformFlow(V, 2.0)
    assert make_text_flow("mask", V, temperature=0.5, jump="euler") == MaskFlow(V, temperature=0.5, jump="euler")
    assert [flow.needs_table for flow in FLOWS] == [True, False, False]


LOGITS, IDS, TIMES = torch.zeros(1, 3, V), torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_text_flow("gauss", V), "text flow: must be one of embedding, uniform, mask, got 'gauss'"),
        (lambda: make_text_flow("embedding", V, exponent=2), "text flow 'embedding': no option 'exponent'; it has"),
        (lambda: MaskFlow(0), "vocab_size: must be at least 1, got 0"),
        (lambda: EmbeddingFlow(0), "vocab_size: must be at least 1, got 0"),
        (lambda: EmbeddingFlow(V, 0.0), "cross_entropy_weight: must be a positive finite number, got 0.0"),
        (lambda: UniformFlow(V, exponent=-1.0), "exponent: must be a positive finite number, got -1.0"),
        (lambda: MaskFlow(V, temperature=-0.1), "temperature: must be a finite number of at least 0, got -0.1"),
        (lambda: MaskFlow(V, temperature=math.nan), "temperature: must be a finite number of at least 0, got nan"),
        (lambda: MaskFlow(V, jump="leap"), "jump: must be 'exact' or 'euler', got 'leap'"),  # type: ignore[arg-type]
        (lambda: EmbeddingFlow(V).corrupt(IDS, TIMES), r"table: the embedding flow needs the token table \[V, D\]"),
        (lambda: EmbeddingFlow(V).initial(1, 3), r"table: the embedding flow needs the token table \[V, D\]"),
        (lambda: EmbeddingFlow(V).tokens(LOGITS), r"table: the embedding flow needs the token table \[V, D\]"),
        (lambda: EmbeddingFlow(V).tokens(LOGITS, torch.zeros(5, V)), r"table: expected \[7, D\], got \[5, 7\]"),
        (
            lambda: EmbeddingFlow(V).loss(
                LOGITS, MaskFlow(V).corrupt(IDS, TIMES), TIMES, token_table(V), "generalized_kl"
            ),
            "kind: the embedding flow has 'cross_entropy' only, got 'generalized_kl'",
        ),
        (
            lambda: EmbeddingFlow(V).loss(LOGITS, MaskFlow(V).corrupt(IDS, TIMES), TIMES, token_table(V)),
            "corrupted.noise: the embedding flow needs it",
        ),
        (
            lambda: EmbeddingFlow(V).loss(
                LOGITS, EmbeddingFlow(V).corrupt(IDS, TIMES, token_table()), TIMES, token_table()
            ),
            r"output: expected \[1, 3, 16\], got \[1, 3, 7\]",
        ),
        (
            lambda: MaskFlow(V).loss(LOGITS, MaskFlow(V).corrupt(IDS, TIMES), TIMES, kind="mse"),
            "kind: must be 'cross_entropy' or 'generalized_kl', got 'mse'",
        ),
        (
            lambda: MaskFlow(V).loss(LOGITS[..., :5], MaskFlow(V).corrupt(IDS, TIMES), TIMES),
            r"output: expected logits \[1, 3, 7\], got \[1, 3, 5\]",
        ),
        (lambda: UniformFlow(V).step(IDS, LOGITS[..., :5], 0.0, 1.0), r"output: expected logits \[1, 3, 7\]"),
        (lambda: UniformFlow(V).step(IDS, LOGITS, 0.5, 0.4), "t, t_next: must satisfy 0 <= t <= t_next <= 1"),
        (lambda: MaskFlow(V).tokens(MaskFlow(V).initial(1, 3)), "x: 3 of 3 tokens are still masked"),
        (lambda: MaskFlow(V).corrupt(IDS, torch.zeros(2)), r"t: expected one time a sample, \[1\], got \[2\]"),
        (lambda: generalized_kl(LOGITS, IDS, IDS, torch.zeros(2)), r"t: expected one time a sample, \[1\], got \[2\]"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------- decoding by confidence, early ends


def test_confident_decoding_ends_in_one_step_where_all_is_sure() -> None:
    flow = MaskFlow(V, temperature=0.0, order="confidence", threshold=0.9)
    x = flow.initial(2, 6)
    sure = torch.zeros(2, 6, V)
    sure[:, :, 3] = 20.0
    sure[1, 4] = 0.0
    after = flow.step(x, sure, 0.0, 0.01)
    assert after[0].tolist() == [3] * 6 and after[1].tolist() == [3, 3, 3, 3, flow.mask_id, 3]
    assert int((flow.step(x, torch.zeros(2, 6, V), 0.0, 0.5) == flow.mask_id).sum()) == 6  # half of each, none sure
    assert not (flow.step(x, torch.zeros(2, 6, V), 0.0, 1.0) == flow.mask_id).any()


def test_a_text_closes_once_its_end_and_all_before_it_stand() -> None:
    flow, m, eos, pad = MaskFlow(V), V, 1, 0
    x = torch.tensor([[4, 2, eos, m, m], [4, m, eos, m, m], [4, 2, 3, m, m], [4, 2, 3, 2, eos]])
    closed, done = flow.close(x, eos, pad)
    assert closed.tolist() == [[4, 2, eos, pad, pad], [4, m, eos, m, m], [4, 2, 3, m, m], [4, 2, 3, 2, eos]]
    assert not done
    assert flow.close(closed[[0, 3]], eos, pad)[1]
    assert UniformFlow(V).close(x, eos, pad) == (x, False)


@pytest.mark.parametrize("options", [{"order": "left"}, {"threshold": 0.0}, {"top_p": 1.5}])
def test_sampling_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MaskFlow(V, **options)
