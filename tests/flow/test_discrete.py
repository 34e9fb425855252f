"""The discrete mixture path: losses against hand-written loops, path and samplers against their theory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from univigu.flow.discrete import cross_entropy, jump_probability, reveal_surest, sample_categorical
from univigu.flow.text import MaskFlow, UniformFlow, make_text_flow

V = 7
DISCRETE = [UniformFlow(V), MaskFlow(V)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_name(flow: UniformFlow) -> str:
    return flow.name


def assert_distribution(samples: torch.Tensor, expected: torch.Tensor, fails: bool = False) -> None:
    """Pearson's chi-square of categorical samples against probabilities, all of them positive or unseen.

    With k - 1 degrees of freedom the statistic has mean k - 1 and variance 2 (k - 1); 5 deviations above it is passed
    by chance less than once in 1,000 for every k used here, and the seeds are fixed.
    """
    counts = torch.bincount(samples.flatten(), minlength=len(expected)).double()
    possible = expected > 0
    assert len(counts) == len(expected) and float(counts[~possible].sum()) == 0
    wanted = expected[possible].double() * samples.numel()
    freedom = int(possible.sum()) - 1
    statistic = float(((counts[possible] - wanted).square() / wanted).sum())
    assert (statistic > freedom + 5 * math.sqrt(2 * freedom)) == fails, statistic


def problem(flow: UniformFlow) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = 2 * torch.randn(4, 6, V, generator=seeded(0))
    tokens = torch.randint(V, (4, 6), generator=seeded(1))
    t = torch.tensor([0.05, 0.4, 0.7, 0.98])
    x_t = flow.corrupt(tokens, t, seeded(2))
    assert 0 < int((x_t == tokens).sum()) < tokens.numel()  # both cases of s occur
    return logits, tokens, x_t, t


def test_the_loss_keeps_no_tensor_of_the_vocabulary_but_the_logits() -> None:
    logits, tokens, *_ = problem(UniformFlow(V))
    logits.requires_grad_()

    def kept(function: Callable[..., torch.Tensor]) -> set[int]:
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
            function(logits)
        return {tensor.data_ptr() for tensor in saved if tensor.numel() == logits.numel()}

    assert kept(lambda logits: cross_entropy(logits, tokens)) == {logits.data_ptr()}
    assert kept(lambda logits: logits.softmax(-1).log()) != {logits.data_ptr()}  # the count sees a softmax


def test_cross_entropy_is_that_of_torch() -> None:
    logits = 3 * torch.randn(2, 5, V, generator=seeded(0))
    tokens = torch.randint(V, (2, 5), generator=seeded(1))
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, tokens), expected)


def test_mask_losses_count_masked_tokens_only() -> None:
    flow = MaskFlow(V)
    logits, tokens, _, t = problem(flow)
    x_t = flow.corrupt(tokens, t, seeded(2))
    masked = x_t == V
    entropy = flow.loss(logits, x_t, tokens)
    torch.testing.assert_close(entropy, torch.where(masked, cross_entropy(logits, tokens), 0.0))
    clean = flow.corrupt(tokens, torch.ones(4))
    assert float(flow.loss(logits, clean, tokens).mean()) == 0.0


def test_uniform_losses_count_every_token() -> None:
    logits, tokens, x_t, _ = problem(UniformFlow(V))
    assert torch.equal(UniformFlow(V).loss(logits, x_t, tokens), cross_entropy(logits, tokens))


def test_corrupted_tokens_follow_the_path_marginal() -> None:
    t = torch.tensor([0.3, 0.8])
    tokens = torch.full((2, 20_000), 2)
    uniform = UniformFlow(V).corrupt(tokens, t, seeded(0))
    mask = MaskFlow(V).corrupt(tokens, t, seeded(0))
    for row, keep in enumerate(t.tolist()):
        expected = torch.full((V,), (1 - keep) / V)
        expected[2] += keep
        assert_distribution(uniform[row], expected)
        expected = torch.zeros(V + 1)
        expected[2], expected[V] = keep, 1 - keep
        assert_distribution(mask[row], expected)
        expected[2], expected[V] = keep - 0.03, 1 - keep + 0.03
        assert_distribution(mask[row], expected, fails=True)


def test_initial_states_are_the_source() -> None:
    assert_distribution(UniformFlow(V).initial(100, 200, seeded(0)), torch.full((V,), 1 / V))
    assert bool((MaskFlow(V).initial(2, 3) == V).all())


def test_categorical_draws_follow_the_softmax_at_its_temperature() -> None:
    logits = torch.tensor([0.3, -1.0, -math.inf, 2.0, 0.0, 1.0, -math.inf])
    rows = logits.expand(4, 5000, V)
    for temperature in (1.0, 0.5, 2.0):
        drawn = sample_categorical(rows, temperature, seeded(0))
        assert_distribution(drawn, (logits / temperature).softmax(-1))
    assert_distribution(drawn, logits.softmax(-1), fails=True)
    assert bool((sample_categorical(rows, 0.0) == 3).all())


def test_categorical_draws_never_leave_the_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extremes of the uniform number: neither may fall on a token of probability 0 or past the last.

    The 500 rows add up to 1, a little less and a little more.
    """
    logits = torch.full((1, 500, 1000), -math.inf)
    logits[..., 10:900] = torch.randn(500, 890, generator=seeded(0))
    totals = logits.softmax(-1).cumsum(-1)[..., -1]
    assert float(totals.min()) < 1 < float(totals.max())
    for extreme in (0.0, 1.0 - 2.0**-24):
        monkeypatch.setattr("univigu.flow.discrete.rand", lambda shape, *_, value=extreme: torch.full(shape, value))
        drawn = sample_categorical(logits, 1.0)
        assert bool((drawn == 10).all()) if extreme == 0 else int(drawn.min()) > 890 and int(drawn.max()) < 900


def test_jump_probabilities() -> None:
    left = math.prod(1 - jump_probability(0.2 + 0.006 * k, 0.2 + 0.006 * (k + 1)) for k in range(100))
    assert 1 - left == pytest.approx(jump_probability(0.2, 0.8)) == pytest.approx(0.75)  # steps compose
    assert jump_probability(0.7, 1.0) == 1.0 and jump_probability(0.7, 0.7) == 0.0


@pytest.mark.parametrize("flow", DISCRETE, ids=by_name)
def test_few_steps_keep_to_the_path(flow: UniformFlow) -> None:
    """Two steps give the path's marginal at t = 0.6, a third one the data.

    The data's tokens are independent, so that their distribution is the posterior of every token to come.
    """
    data = torch.tensor([0.4, 0.3, 0.0, 0.1, 0.1, 0.1, 0.0])
    source = torch.tensor([0.0] * V + [1.0]) if isinstance(flow, MaskFlow) else torch.tensor([1 / V] * V + [0.0])
    logits = data.log().expand(1, 20_000, V)
    generator = seeded(4)
    x = flow.initial(1, 20_000, generator)
    for t, t_next in ((0.0, 0.3), (0.3, 0.6)):
        x = flow.step(x, logits, t, t_next, generator)
    for keep, fails in ((0.6, False), (0.55, True)):
        expected = keep * torch.cat((data, torch.zeros(1))) + (1 - keep) * source
        assert_distribution(x, expected, fails)
    assert_distribution(flow.tokens(flow.step(x, logits, 0.6, 1.0, generator)), data)


@pytest.mark.parametrize("name", ["uniform", "mask"])
def test_sampler_ends_at_correlated_data(name: str) -> None:
    """Two dependent tokens; the 'network' is their exact posterior. The end must have the joint distribution.

    A step moves both tokens independently, which biases the joint by O(1/steps); here this adds less than 4 to a
    chi-square whose bound is 5 deviations (20) above its mean.
    """
    joint = torch.tensor([[0.30, 0.02, 0.03], [0.03, 0.25, 0.02], [0.05, 0.05, 0.25]])
    flow, samples, steps, generator = make_text_flow(name, 3), 4_000, 80, seeded(5)
    x = flow.initial(samples, 2, generator)
    for k in range(steps):
        logits = exact_posterior(joint, x, k / steps, masked=name == "mask").log()
        x = flow.step(x, logits, k / steps, (k + 1) / steps, generator)
    pairs = flow.tokens(x) @ torch.tensor([3, 1])
    assert_distribution(pairs, joint.flatten())
    independent = joint.sum(1)[:, None] * joint.sum(0)[None]
    assert_distribution(pairs, independent.flatten(), fails=True)


def exact_posterior(joint: torch.Tensor, x: torch.Tensor, keep: float, masked: bool) -> torch.Tensor:
    """P(x_1^i = y | x_t) for both tokens i: [B, 2, 3], by Bayes over the nine pairs."""
    size = len(joint)
    likelihood = torch.full((size + 1, size), 0.0 if masked else (1 - keep) / size)  # P(x_t | x_1), last row the mask
    likelihood[:size] += keep * torch.eye(size)
    likelihood[size] = 1 - keep
    first, second = likelihood[x[:, 0]], likelihood[x[:, 1]]  # [B, 3]
    pairs = joint * first[:, :, None] * second[:, None, :]
    posterior = torch.stack((pairs.sum(2), pairs.sum(1)), dim=1)
    return posterior / posterior.sum(-1, keepdim=True)


def test_mask_steps_leave_revealed_tokens_alone() -> None:
    flow = MaskFlow(V)
    x = torch.tensor([[0, V, 3, V, 6]])
    logits = torch.zeros(1, 5, V)
    logits[..., 2] = 50.0
    for t_next in (0.6, 0.9, 1.0):
        moved = flow.step(x, logits, 0.5, t_next, seeded(0))
        assert moved[0, [0, 2, 4]].tolist() == [0, 3, 6]
    assert moved[0].tolist() == [0, 2, 3, 2, 6]
    assert flow.step(x, logits, 0.5, 0.5).tolist() == x.tolist()
    assert UniformFlow(V).step(x.clamp(max=V - 1), logits, 0.5, 1.0).tolist() == [[2] * 5]


# ---------------------------------------------------------------------- nucleus, and the surest first


def test_nucleus_keeps_the_fewest_likeliest_tokens() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits = probabilities.log().expand(1, 4000, 4)
    for top_p, kept in ((0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.9, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        drawn = sample_categorical(logits, 1.0, seeded(0), top_p)
        counts = torch.bincount(drawn[0], minlength=4) / 4000
        expected = torch.zeros(4).index_copy(0, torch.tensor(kept), probabilities[kept])
        torch.testing.assert_close(counts, expected / expected.sum(), rtol=0, atol=0.03)
        assert sorted(set(drawn[0].tolist())) == kept


def test_the_surest_are_revealed_first_and_the_schedule_is_kept() -> None:
    masked = torch.tensor([[True, True, False, True, True], [False, True, False, False, False]])
    confidence = torch.tensor([[0.2, 0.9, 1.0, 0.5, 0.95], [1.0, 0.1, 1.0, 1.0, 1.0]])

    def revealed(probability: float) -> list[list[int]]:
        return [row.nonzero()[:, 0].tolist() for row in reveal_surest(masked, confidence, probability)]

    assert revealed(0.25) == [[4], [1]]
    assert revealed(0.3) == [[1, 4], [1]]  # two of four, rounded up
    assert revealed(0.0) == [[], []]
    assert revealed(1.0) == [[0, 1, 3, 4], [1]]
