"""The uni-flow objective: how a batch is split, what each task is shown, and that it can be learned."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tiny
from univigu.flow.objective import (
    ConditionDropout,
    TaskMixture,
    UniFlowBatch,
    UniFlowLosses,
    UniFlowObjective,
    by_noise_level,
)
from univigu.flow.random import make_generator
from univigu.flow.text import EMBEDDING_TIME_POWER, make_text_flow

VOCAB, FLOWS = 11, ("embedding", "uniform", "mask")


def make_batch(batch: int = 4, length: int = 6) -> UniFlowBatch:
    generator = torch.Generator().manual_seed(0)
    return UniFlowBatch(
        latents=torch.randn(batch, tiny.CHANNELS, 2, 4, 6, generator=generator),
        prompt_embeds=torch.randn(batch, 5, tiny.TEXT_DIM, generator=generator),
        null_embeds=torch.randn(1, 5, tiny.TEXT_DIM, generator=generator),
        text_ids=torch.randint(VOCAB, (batch, length), generator=generator),
    )


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny.make_unified(tiny.make_wan(), VOCAB, text_flow=name) for name in FLOWS}


def measure(model: Any, batch: UniFlowBatch, counts: Any, flow: str = "mask", seed: int = 0, **kwargs: Any) -> Any:
    objective = UniFlowObjective(make_text_flow(flow, VOCAB))
    return objective(model, batch, counts, generator=torch.Generator().manual_seed(seed), **kwargs)


class Watch:
    """Records what the model is called with."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.calls = model, model.config, []

    def __call__(self, *args: Any) -> Any:
        self.calls.append(args)
        return self.model(*args)

    def token_table(self) -> torch.Tensor:
        return self.model.token_table()


# ---------------------------------------------------------------------- splitting a batch


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("shares", [(0.25, 0.5, 0.25), (0.4, 0.1, 0.5), (1, 0, 0), (0, 3, 0), (0.1, 0, 0.2)])
def test_counts_fill_the_batch_and_keep_the_shares(batch_size: int, shares: tuple[float, ...]) -> None:
    tasks, total, steps = TaskMixture(*shares), [0, 0, 0], 600
    for step in range(steps):
        counts = tasks.counts(batch_size, step)
        assert sum(counts) == batch_size and min(counts) >= 0, (step, counts)
        assert all(count == 0 for count, share in zip(counts, shares, strict=True) if share == 0)
        total = [a + b for a, b in zip(total, counts, strict=True)]
        for seen, share in zip(total, shares, strict=True):  # never more than two samples away
            assert abs(seen - share / sum(shares) * batch_size * (step + 1)) < 2
    assert total == [round(share / sum(shares) * batch_size * steps) for share in shares]  # 600: all come out even


def test_counts_divide_evenly_where_they_can_and_do_not_draw() -> None:
    state = torch.get_rng_state()
    assert {TaskMixture().counts(8, step) for step in range(50)} == {(2, 4, 2)}
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("shares", "message"),
    [((-1, 1, 1), r"tasks\.joint=-1"), ((1, 1, -0.5), r"tasks\.generate=-0\.5"), ((0, 0, 0), "tasks")],
)
def test_mixtures_out_of_range_are_named(shares: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskMixture(*shares)


# ---------------------------------------------------------------------- what each task sees


@pytest.mark.parametrize("flow", FLOWS)
def test_each_task_sees_what_it_should(models: dict[str, Any], flow: str) -> None:
    watch, batch = Watch(models[flow]), make_batch(6)
    losses = measure(watch, batch, (2, 1, 3), flow)
    joint, understand, (noisy_only, timestep_only, _) = watch.calls
    noisy, timestep, _, (text, text_timestep, *_) = joint
    clean, timestep_clean, _, (text_clean, text_timestep_clean, *_) = understand
    assert timestep_clean.tolist() == [0] and torch.equal(clean, batch.latents[2:3])
    assert (timestep > 0).all() and (noisy != batch.latents[:2]).all()
    assert (timestep_only > 0).all() and (noisy_only != batch.latents[3:]).all()
    assert len(text) == len(text_timestep) == 2 and len(text_clean) == len(text_timestep_clean) == 1
    assert losses.video.shape == losses.video_times.shape == (5,) and losses.text.shape == (3,)
    torch.testing.assert_close(losses.video_times, 1 - torch.cat([timestep, timestep_only]) / 1000)
    torch.testing.assert_close(losses.text_times, 1 - torch.cat([text_timestep, text_timestep_clean]) / 1000)


def test_video_loss_is_the_squared_error_of_noise_minus_data() -> None:
    """A model that answers (z_t - data) / sigma = noise - data is perfect."""
    batch = make_batch()

    def oracle(noisy: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> Any:
        return SimpleNamespace(sample=(noisy - batch.latents) / (timestep / 1000).view(-1, 1, 1, 1, 1))

    def wrong_sign(*args: Any) -> Any:
        return SimpleNamespace(sample=-oracle(*args).sample)

    assert measure(oracle, batch, (0, 0, 4)).video.max() < 1e-6
    assert measure(wrong_sign, batch, (0, 0, 4)).video.min() > 1.0


@pytest.mark.parametrize("counts", [(4, 0, 0), (0, 4, 0), (0, 0, 4), (1, 2, 1)])
def test_full_dropout_hides_the_prompt_and_none_shows_it(models: dict[str, Any], counts: Any) -> None:
    batch = make_batch()
    other = replace(batch, prompt_embeds=batch.prompt_embeds + 1)

    def both(batch: UniFlowBatch, dropout: float) -> torch.Tensor:
        losses = measure(models["mask"], batch, counts, dropout=ConditionDropout(dropout, dropout, dropout))
        return torch.cat([losses.video, losses.text])

    assert torch.equal(both(batch, 1.0), both(other, 1.0))
    assert not torch.equal(both(batch, 0.0), both(other, 0.0))


def test_each_dropout_belongs_to_its_tasks(models: dict[str, Any]) -> None:
    batch, watch = make_batch(), Watch(models["mask"])
    measure(watch, batch, (1, 1, 2), dropout=ConditionDropout(1.0, 1.0, 0.0))
    assert torch.equal(watch.calls[0][2], batch.null_embeds)
    assert torch.equal(watch.calls[1][2], batch.null_embeds)
    assert torch.equal(watch.calls[2][2], batch.prompt_embeds[2:])
    measure(watch, batch, (1, 1, 2), dropout=ConditionDropout(0.0, 1.0, 0.0))
    assert torch.equal(watch.calls[3][2], batch.prompt_embeds[:1])
    assert torch.equal(watch.calls[4][2], batch.null_embeds)


def test_dropout_has_the_given_rate() -> None:
    count = 4000
    small = UniFlowBatch(torch.zeros(count, 1, 1, 1, 1), torch.ones(count, 1, 1), torch.zeros(1, 1, 1))
    kept = []

    def model(noisy: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> Any:
        kept.append(embeds.mean().item())
        return SimpleNamespace(sample=noisy)

    measure(model, small, (0, 0, count), dropout=ConditionDropout(0.0, 0.0, 0.3))
    assert abs(kept[0] - 0.7) < 4 * (0.21 / count) ** 0.5


def test_generate_does_not_touch_the_text(models: dict[str, Any]) -> None:
    batch = make_batch()
    other = replace(batch, text_ids=(batch.text_ids + 1) % VOCAB)
    first, second = (measure(models["uniform"], b, (1, 1, 2), "uniform") for b in (batch, other))
    assert torch.equal(first.video[1:], second.video[1:])
    assert not torch.equal(first.video[:1], second.video[:1]) and not torch.equal(first.text, second.text)
    assert measure(models["uniform"], replace(batch, text_ids=None), (0, 0, 4), "uniform").text.shape == (0,)


@pytest.mark.parametrize("flow", FLOWS)
def test_same_seed_same_losses(models: dict[str, Any], flow: str) -> None:
    first, again, other = (measure(models[flow], make_batch(), (1, 2, 1), flow, seed) for seed in (5, 5, 6))
    for name in ("video", "video_times", "text", "text_times"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_positions_are_drawn_evenly_and_in_order() -> None:
    flow, generator = make_text_flow("mask", VOCAB), torch.Generator().manual_seed(0)
    objective, batch = UniFlowObjective(flow), make_batch(4000)
    positions = objective._corrupt(flow, batch, 4000, 0.5, generator)[0].positions
    assert positions is not None and positions.shape == (4000, 3) and (positions.diff(dim=1) > 0).all()
    assert positions.flatten().bincount().tolist() == pytest.approx([2000] * 6, rel=0.06)
    shown, tokens, _ = objective._corrupt(flow, batch, 2, 1e-3, generator)
    assert shown.tokens.shape == tokens.shape == (2, 1)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_share_of_the_text_is_the_tokens_at_its_positions(models: dict[str, Any], flow: str) -> None:
    """The targets are those positions' tokens: the loss of each task's text is that of a model given just these."""
    watch, batch = Watch(models[flow]), make_batch(6)
    losses = measure(watch, batch, (2, 3, 1), flow, text_share=0.5)
    joint, understand = (call[3].positions for call in watch.calls[:2])
    assert len(watch.calls[2]) == 3 and joint.shape == (2, 3) and understand.shape == (3, 3)
    assert [call[3].tokens.shape[1] for call in watch.calls[:2]] == [3, 3]
    assert batch.text_ids is not None
    for rows, positions, call in ((slice(0, 2), joint, watch.calls[0]), (slice(2, 5), understand, watch.calls[1])):
        truth = batch.text_ids[rows].gather(1, positions)
        if flow == "mask":  # what is shown of the text is the truth or the mask
            assert ((call[3].tokens == truth) | (call[3].tokens == VOCAB)).all()
    assert losses.text.shape == (5,) and losses.text.isfinite().all()
    whole = Watch(models[flow])
    measure(whole, batch, (2, 3, 1), flow, text_share=1.0)
    assert whole.calls[0][3].positions is None and whole.calls[0][3].tokens.shape[1] == 6


def test_self_conditioning_feeds_back_the_own_prediction(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half of the steps, the same in all processes; without gradients, and for this flow only."""
    model, batch, second = models["embedding"], make_batch(), []
    for step in range(10):
        watch = Watch(model)
        measure(watch, batch, (2, 2, 0), "embedding", step=step)
        given = [call[3].endpoint for call in watch.calls]
        second.append(len(given) == 4)
        assert [endpoint is not None for endpoint in given] == ([False, True] * 2 if second[-1] else [False] * 2)
        if second[-1]:  # the posterior mean is a mixture of rows
            assert given[1].shape == (2, 6, 24) and not given[1].requires_grad and given[1].square().mean() <= 1.0
    assert 2 < sum(second) < 8
    expected = measure(model, batch, (2, 2, 0), "embedding", step=second.index(False))
    monkeypatch.setattr("univigu.flow.objective.MAX_LOGITS", 2 * VOCAB)
    parts = UniFlowObjective(make_text_flow("embedding", VOCAB))
    for step, same in ((second.index(False), True), (second.index(True), False)):
        found = parts(model, batch, (2, 2, 0), generator=torch.Generator().manual_seed(0), step=step)
        assert torch.allclose(found.text, expected.text, atol=1e-5) == same
    watch = Watch(models["mask"])
    measure(watch, batch, (2, 2, 0), step=second.index(True))
    assert len(watch.calls) == 2


def test_embedding_times_are_warped(models: dict[str, Any]) -> None:
    even, warped = (measure(models[name], make_batch(), (2, 2, 0), name).text_times for name in ("mask", "embedding"))
    torch.testing.assert_close(warped, even**EMBEDDING_TIME_POWER)


def test_time_options_are_used(models: dict[str, Any]) -> None:
    objective = UniFlowObjective(make_text_flow("mask", VOCAB), shift=1000.0)  # almost always nearly pure noise
    losses = objective(models["mask"], make_batch(), (2, 0, 2), generator=torch.Generator().manual_seed(0))
    assert (losses.video_times < 0.1).all()


def test_batches_that_do_not_fit_are_refused(models: dict[str, Any]) -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match=r"counts=\(1, 1, 1\): expected a sum of 4"):
        measure(models["mask"], batch, (1, 1, 1))
    with pytest.raises(ValueError, match="text_ids=None"):
        measure(models["mask"], replace(batch, text_ids=None), (0, 4, 0))


# ---------------------------------------------------------------------- losses


def test_total_counts_every_sample_once() -> None:
    losses = UniFlowLosses(torch.tensor([1.0, 2.0]), torch.zeros(2), torch.tensor([10.0, 20.0, 30.0]), torch.zeros(3))
    assert losses.total(batch_size=4).item() == (3 + 60) / 4
    losses.teacher = torch.tensor([0.5, 1.0])
    assert losses.total(4, teacher_weight=8.0).item() == (3 + 60 + 8 * 1.5) / 4
    none = replace(losses, text=torch.zeros(0), teacher=None)
    assert none.total(3).item() == 1.0


def test_a_teacher_replaces_the_data_of_the_generate_share(models: dict[str, Any]) -> None:
    """A model that computes what its teacher does has no distance to it; joint samples still learn from the data."""
    model, wan, batch = models["mask"], tiny.make_wan(), make_batch()
    objective = UniFlowObjective(make_text_flow("mask", VOCAB))

    def run(teacher: Any, counts: tuple[int, int, int]) -> UniFlowLosses:
        return objective(model, batch, counts, generator=torch.Generator().manual_seed(0), teacher=teacher)

    alone, taught = run(None, (1, 1, 2)), run(wan, (1, 1, 2))
    assert alone.teacher is None and alone.video.shape == (3,)
    assert taught.video.equal(alone.video[:1]) and taught.text.equal(alone.text)
    assert taught.teacher is not None and taught.teacher.shape == (2,)
    other = tiny.make_wan()
    torch.nn.init.normal_(other.proj_out.weight)
    distance = run(other, (0, 0, 4))
    assert distance.video.numel() == 0 and (distance.teacher > 0).all()
    assert run(model, (0, 0, 4)).teacher.equal(torch.zeros(4))
    distance.total(4, 8.0).backward()
    assert all(parameter.grad is None for parameter in other.parameters())


def test_losses_by_noise_level() -> None:
    times = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1.0])
    named = by_noise_level(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), times)
    assert {name: value.item() for name, value in named.items()} == {"t0.00-0.25": 2, "t0.25-0.50": 5, "t0.75-1.00": 8}
    assert by_noise_level(torch.zeros(0), torch.zeros(0)) == {}


@pytest.mark.parametrize("flow", FLOWS)
def test_forward_and_backward_are_finite(models: dict[str, Any], flow: str) -> None:
    model = models[flow]
    model.zero_grad(set_to_none=True)
    twice = next(step for step in range(9) if torch.rand((), generator=make_generator("cpu", step)) < 0.5)
    losses = measure(model, make_batch(), (1, 2, 1), flow, step=twice)
    losses.total(4).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["vocab_embed.weight"].abs().sum() > 0 and gradients["proj_out.weight"].abs().sum() > 0


@pytest.mark.parametrize("flow", FLOWS)
def test_one_batch_can_be_learned(flow: str) -> None:
    model, batch = tiny.make_unified(tiny.make_wan(), VOCAB, text_flow=flow), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def losses() -> tuple[float, float]:
        with torch.no_grad():
            result = measure(model, batch, (4, 0, 0), flow, seed=1)
        return result.video.mean().item(), result.text.mean().item()

    video_before, text_before = losses()
    for step in range(25):
        optimizer.zero_grad()
        measure(model, batch, (4, 0, 0), flow, seed=step).total(4).backward()
        optimizer.step()
    video_after, text_after = losses()
    assert video_after < 0.9 * video_before
    assert text_after < 0.85 * text_before
