"""Sampling: generation is WanPipeline's, samples do not depend on their batch, every task leaves alone what it must."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from univigu.flow.text import make_text_flow
from univigu.models import UniViGUTransformer3DModel
from univigu.models.foundation import encode_prompt, tokenize
from univigu.sampling.tasks import Sampler, SamplingOptions, uniform_times

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[1] / "tiny.py")))

VOCAB, LENGTH, FLOWS = 11, 6, ("embedding", "uniform", "mask")
SHAPE = (tiny.CHANNELS, 2, 4, 6)  # latents of 5 frames of 32 x 48
PROMPTS = ["a red circle moves left.", "", "two blue squares"]


@pytest.fixture(scope="session")
def pipeline() -> WanPipeline:
    pipeline = tiny.make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def embeds() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts' embeddings and the null condition's."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(4, 5, tiny.TEXT_DIM, generator=generator)
    return draw[:3], draw[3:]


class Watch:
    """Passes calls on to a model and records them."""

    def __init__(self, model: UniViGUTransformer3DModel) -> None:
        self.model, self.dtype, self.token_table, self.calls = model, model.dtype, model.token_table, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.model(*args, **kwargs)


def make_sampler(flow: str = "mask", **options: Any) -> Sampler:
    model = tiny.make_unified(tiny.make_wan(), VOCAB, text_flow=flow)
    defaults = {"num_inference_steps": 3, "caption_steps": 4}
    return Sampler(
        Watch(model),
        make_text_flow(flow, VOCAB),
        tiny.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        SamplingOptions(**(defaults | options)),
    )


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---------------------------------------------------------------------- parity with diffusers


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_generate_is_wan_pipeline(pipeline: WanPipeline, scheduler: str, guidance: float) -> None:
    schedulers = {"unipc": pipeline.scheduler, "euler": FlowMatchEulerDiscreteScheduler(shift=5.0)}
    pipe = WanPipeline(**{**pipeline.components, "scheduler": schedulers[scheduler]})
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    common = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"}
    expected = pipe(PROMPTS, guidance_scale=guidance, latents=noise.clone(), max_sequence_length=16, **common).frames

    ids = tokenize(pipeline.tokenizer, [*PROMPTS, ""], 16)
    with torch.no_grad():
        prompts = encode_prompt(pipeline.text_encoder, ids, pipeline.tokenizer.pad_token_id)
    model = UniViGUTransformer3DModel.from_wan(pipeline.transformer, VOCAB).eval()
    options = SamplingOptions(num_inference_steps=4, guidance_scale=guidance)
    sampler = Sampler(model, make_text_flow("uniform", VOCAB), schedulers[scheduler], options)
    ours = sampler.generate(prompts[:-1], prompts[-1:], SHAPE, latents=noise).latents
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    wrong = sampler.generate(prompts[:-1].roll(1, 0), prompts[-1:], SHAPE, latents=noise).latents
    assert (wrong - expected).abs().max() > 1e-3

    given = pipe(
        prompt_embeds=prompts[:-1], negative_prompt_embeds=prompts[-1:].expand(3, -1, -1), guidance_scale=guidance,
        generator=generators(1, 2, 3), **common,
    ).frames  # fmt: skip
    seeded = sampler.generate(prompts[:-1], prompts[-1:], SHAPE, generators(1, 2, 3)).latents
    torch.testing.assert_close(seeded, given, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- batches


def same(alone: torch.Tensor | None, together: torch.Tensor | None, row: int) -> None:
    assert (alone is None) == (together is None)
    if alone is not None and together is not None:
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("task", ["generate", "caption", "joint"])
def test_a_sample_does_not_depend_on_its_batch(embeds: Any, task: str, flow: str) -> None:
    sampler, (prompts, null) = make_sampler(flow), embeds
    clean = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(9))

    def sample(rows: list[int]) -> Any:
        sources = generators(*[10 + row for row in rows])
        if task == "generate":
            return sampler.generate(prompts[rows], null, SHAPE, sources)
        if task == "caption":
            return sampler.caption(clean[rows], prompts[rows], LENGTH, sources)
        return sampler.joint(prompts[rows], null, SHAPE, LENGTH, sources)

    together = sample([0, 1, 2])
    for row in range(3):
        alone = sample([row])
        same(alone.latents, together.latents, row)
        same(alone.tokens, together.tokens, row)
    assert (together.tokens is None) == (task == "generate")
    if together.tokens is not None:
        assert together.tokens.shape == (3, LENGTH) and together.tokens.dtype == torch.int64
        assert together.tokens.min() >= 0 and together.tokens.max() < VOCAB


def test_one_condition_serves_all_captions(embeds: Any) -> None:
    sampler, (_, null) = make_sampler(), embeds
    clean = torch.randn(3, *SHAPE)
    tokens = [sampler.caption(clean, e, LENGTH, generators(1, 2, 3)).tokens for e in (null, null.expand(3, -1, -1))]
    assert torch.equal(*tokens)


# ---------------------------------------------------------------------- what is evaluated, and when


def test_caption_leaves_the_video_alone(embeds: Any) -> None:
    sampler, (prompts, _) = make_sampler(), embeds
    clean = torch.randn(3, *SHAPE)
    before, seen = clean.clone(), []
    samples = sampler.caption(
        clean, prompts, LENGTH, generators(1, 2, 3), on_step=lambda i, video, text: seen.append((i, video, text))
    )
    assert samples.latents is clean and torch.equal(clean, before)
    assert len(sampler.model.calls) == 4
    for (video, timestep, condition), text in sampler.model.calls:
        assert torch.equal(video, before) and not timestep.any() and torch.equal(condition, prompts)
        assert text["text_timestep"].shape == (3,)
    times = [text["text_timestep"][0].item() for _, text in sampler.model.calls]
    assert times == [1000.0, 750.0, 500.0, 250.0]
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][2], samples.tokens)


@pytest.mark.parametrize(("guidance", "passes"), [(0.0, 1), (1.0, 1), (1.01, 2), (4.0, 2)])
@pytest.mark.parametrize("task", ["generate", "joint"])
def test_guidance_costs_a_second_pass_only_above_one(embeds: Any, task: str, guidance: float, passes: int) -> None:
    sampler, (prompts, null) = make_sampler(guidance_scale=guidance), embeds
    seen: list[int] = []
    arguments = {"generate": (SHAPE,), "joint": (SHAPE, LENGTH)}[task]
    getattr(sampler, task)(prompts, null, *arguments, on_step=lambda i, video, text: seen.append(i))
    assert len(sampler.model.calls) == 3 * passes and seen == [0, 1, 2]
    for args, kwargs in sampler.model.calls[::passes]:
        assert torch.equal(args[2], prompts) and bool(kwargs) == (task == "joint")
    if passes == 2:  # the second sees neither prompt nor text
        for args, kwargs in sampler.model.calls[1::2]:
            assert torch.equal(args[2], null.expand(3, -1, -1)) and not kwargs


def test_joint_moves_both_in_parallel(embeds: Any) -> None:
    sampler, (prompts, null) = make_sampler(guidance_scale=1.0, solver="euler", num_inference_steps=4), embeds
    sampler.joint(prompts, null, SHAPE, LENGTH)
    video = torch.stack([args[1] for args, _ in sampler.model.calls])
    text = torch.stack([kwargs["text_timestep"] for _, kwargs in sampler.model.calls])
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(text, (1000 * even)[:, None].expand(4, 3))
    shifted = 3 * even / (1 + 2 * even)  # the scheduler's flow_shift
    torch.testing.assert_close(video, (1000 * shifted)[:, None].expand(4, 3))


def test_the_state_stays_float32_beside_a_bfloat16_model(embeds: Any) -> None:
    sampler, (prompts, null) = make_sampler("embedding"), embeds
    sampler.model = Watch(sampler.model.model.to(torch.bfloat16))
    states: list[Any] = []
    samples = sampler.joint(prompts, null, SHAPE, LENGTH, on_step=lambda i, *both: states.extend(both))
    assert all(state.dtype == torch.float32 for state in states) and samples.latents.dtype == torch.float32
    assert all(args[0].dtype == args[2].dtype == torch.bfloat16 for args, _ in sampler.model.calls)
    assert all(args[1].dtype == torch.float32 for args, _ in sampler.model.calls)


def test_the_scheduler_given_is_only_a_template(embeds: Any) -> None:
    sampler, (prompts, null) = make_sampler(), embeds
    first, second = (sampler.generate(prompts, null, SHAPE, generators(1, 2, 3)).latents for _ in range(2))
    assert torch.equal(first, second) and sampler.scheduler.step_index is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, r"sampling\.num_inference_steps=0"),
        ({"caption_steps": -1}, r"sampling\.caption_steps=-1"),
        ({"temperature": -0.5}, r"sampling\.temperature=-0\.5"),
        ({"solver": "dpm"}, r"sampling\.solver='dpm'"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


def test_uniform_times_run_from_noise_to_data() -> None:
    assert uniform_times(1) == [0.0, 1.0] and uniform_times(4) == [0.0, 0.25, 0.5, 0.75, 1.0]
