"""Sampling: generation is WanPipeline's, samples do not depend on their batch, every task leaves alone what it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, WanPipeline

from tests import tiny
from tests.tasks import Tasks
from univigu.models.encode import encode_prompts
from univigu.models.tokens import tokenize
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.sampling.options import SamplingOptions
from univigu.sampling.sampler import StepState

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
        self.model, self.config, self.calls = model, model.config, []
        self.dtype, self.token_table = model.dtype, model.token_table

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.model(*args, **kwargs)


def make_sampler(flow: str = "mask", reads_text: bool = True, model: Any = None, **options: Any) -> Tasks:
    architecture = {"text_flow": flow, "clean_video_reads_text": reads_text, **(model or {})}
    model = tiny.make_unified(tiny.make_wan(), VOCAB, **architecture)
    defaults = {"num_inference_steps": 3, "caption_steps": 4, "joint_lag": 0, "text_order": "random"}
    sampling = SamplingOptions(**(defaults | options))
    return Tasks(
        Watch(model),
        tiny.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        sampling,
    )


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---------------------------------------------------------------------- parity with diffusers


@pytest.mark.parametrize(("scheduler", "guidance"), [("unipc", 4.0), ("euler", 1.0)])
def test_generate_is_wan_pipeline(pipeline: WanPipeline, scheduler: str, guidance: float) -> None:
    schedulers = {"unipc": pipeline.scheduler, "euler": FlowMatchEulerDiscreteScheduler(shift=5.0)}
    pipe = WanPipeline(**{**pipeline.components, "scheduler": schedulers[scheduler]})
    pipe.set_progress_bar_config(disable=True)
    common = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"}
    expected = pipe(
        PROMPTS, guidance_scale=guidance, generator=generators(1, 2, 3), max_sequence_length=16, **common
    ).frames

    ids = tokenize(pipeline.tokenizer, [*PROMPTS, ""], 16)
    with torch.no_grad():
        prompts = encode_prompts(pipeline.text_encoder, ids, pipeline.tokenizer.pad_token_id)
    model = UniViGUTransformer3DModel.from_wan(pipeline.transformer, VOCAB).eval()
    options = SamplingOptions(num_inference_steps=4, guidance_scale=guidance, joint_lag=0)
    sampler = Tasks(model, schedulers[scheduler], options)
    ours = sampler.generate(prompts[:-1], prompts[-1:], SHAPE, generators(1, 2, 3)).latents
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    wrong = sampler.generate(prompts[:-1].roll(1, 0), prompts[-1:], SHAPE, generators(1, 2, 3)).latents
    assert (wrong - expected).abs().max() > 1e-3


# ---------------------------------------------------------------------- batches


def same(alone: torch.Tensor | None, together: torch.Tensor | None, row: int) -> None:
    assert (alone is None) == (together is None)
    if alone is not None and together is not None:
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "flow"), [("generate", "mask"), ("caption", "uniform"), ("caption", "mask"), ("joint", "embedding")]
)
def test_a_sample_does_not_depend_on_its_batch(embeds: Any, task: str, flow: str) -> None:
    sampler, (prompts, null) = make_sampler(flow), embeds
    clean = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(9))

    def sample(rows: list[int]) -> Any:
        sources = generators(*[10 + row for row in rows])
        if task == "generate":
            return sampler.generate(prompts[rows], null, SHAPE, sources)
        if task == "caption":
            return sampler.caption(clean[rows], prompts[rows], null, LENGTH, sources)
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
    tokens = [
        sampler.caption(clean, e, null, LENGTH, generators(1, 2, 3)).tokens for e in (null, null.expand(3, -1, -1))
    ]
    assert torch.equal(*tokens)


# ---------------------------------------------------------------------- what is evaluated, and when


def test_caption_leaves_the_video_alone(embeds: Any) -> None:
    sampler, (prompts, null) = make_sampler(), embeds
    clean = torch.randn(3, *SHAPE)
    before, seen = clean.clone(), []
    samples = sampler.caption(clean, prompts, null, LENGTH, generators(1, 2, 3), on_step=seen.append)
    assert samples.latents is clean and torch.equal(clean, before)
    assert len(sampler.model.calls) == 4
    for (video, timestep, condition), text in sampler.model.calls:
        assert torch.equal(video, before) and not timestep.any() and torch.equal(condition, prompts)
        assert text["text"].timestep.shape == (3,)
    times = [text["text"].timestep[0].item() for _, text in sampler.model.calls]
    assert times == [1000.0, 750.0, 500.0, 250.0]
    assert [(s.step, s.num_steps, s.video_time, s.text_time) for s in seen] == [
        (0, 4, 1.0, 0.25),
        (1, 4, 1.0, 0.5),
        (2, 4, 1.0, 0.75),
        (3, 4, 1.0, 1.0),
    ]
    assert torch.equal(seen[-1].text, samples.tokens)


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (1.01, 2)])
@pytest.mark.parametrize("task", ["generate", "joint"])
def test_guidance_costs_a_second_pass_only_above_one(embeds: Any, task: str, guidance: float, passes: int) -> None:
    sampler, (prompts, null) = make_sampler(guidance_scale=guidance), embeds
    seen: list[int] = []
    arguments = {"generate": (SHAPE,), "joint": (SHAPE, LENGTH)}[task]
    getattr(sampler, task)(prompts, null, *arguments, on_step=lambda state: seen.append(state.step))
    assert len(sampler.model.calls) == 3 * passes and seen == [0, 1, 2]
    for args, kwargs in sampler.model.calls[::passes]:
        assert torch.equal(args[2], prompts) and (kwargs.get("text") is not None) == (task == "joint")
    if passes == 2:  # the second sees neither prompt nor text
        for args, kwargs in sampler.model.calls[1::2]:
            assert torch.equal(args[2], null.expand(3, -1, -1)) and kwargs.get("text") is None


def test_joint_moves_both_in_parallel(embeds: Any) -> None:
    sampler, (prompts, null) = make_sampler(guidance_scale=1.0, solver="euler", num_inference_steps=4), embeds
    sampler.joint(prompts, null, SHAPE, LENGTH)
    video = torch.stack([args[1] for args, _ in sampler.model.calls])
    text = torch.stack([kwargs.get("text").timestep for _, kwargs in sampler.model.calls])
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(text, (1000 * even)[:, None].expand(4, 3))
    shifted = 3 * even / (1 + 2 * even)  # the scheduler's flow_shift
    torch.testing.assert_close(video, (1000 * shifted)[:, None].expand(4, 3))


@pytest.mark.parametrize("reads_text", [True, False])
def test_the_text_of_joint_may_end_after_the_video(embeds: Any, reads_text: bool) -> None:
    options = {"guidance_scale": 1.0, "num_inference_steps": 3, "text_order": "confidence"}
    sampler, (prompts, null) = make_sampler(reads_text=reads_text, joint_lag=2, **options), embeds
    seen: list[StepState] = []
    samples = sampler.joint(prompts, null, SHAPE, LENGTH, generators(1, 2, 3), seen.append)
    calls = sampler.model.calls
    texts = [kwargs.get("text") for _, kwargs in calls if "text" in kwargs]
    assert [round(float(text.timestep[0])) for text in texts] == [1000, 800, 600, 400, 200]
    # the finished video under the prompt; one that reads no text is computed once
    for args, _ in calls[3:] if reads_text else calls[3:4]:
        assert torch.equal(args[0], samples.latents) and not args[1].any() and torch.equal(args[2], prompts)
    assert reads_text or calls[4][0] == calls[5][0] == (None, None, None)
    assert [(state.step, state.num_steps) for state in seen] == [(i, 5) for i in range(5)]
    assert [state.video_time for state in seen[2:]] == [1.0] * 3 and torch.equal(seen[-1].text, samples.tokens)
    assert not (samples.tokens == VOCAB).any() and (seen[2].text == VOCAB).any()


def test_the_state_stays_float32_beside_a_bfloat16_model(embeds: Any) -> None:
    sampler, (prompts, null) = make_sampler("embedding"), embeds
    sampler.model = Watch(sampler.model.model.to(torch.bfloat16))
    states: list[Any] = []
    samples = sampler.joint(
        prompts, null, SHAPE, LENGTH, on_step=lambda state: states.extend((state.latents, state.text))
    )
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
        ({"solver": "rk4"}, r"sampling\.solver='rk4'"),
        ({"joint_lag": -1}, r"sampling\.joint_lag=-1"),
        ({"caption_refresh": 0}, r"sampling\.caption_refresh=0"),
        ({"solver": "heun"}, r"sampling\.solver='heun'"),
        ({"text_order": "left"}, r"sampling\.text_order='left'"),
        ({"top_p": 0.0}, r"sampling\.top_p=0\.0"),
        ({"guidance_interval": (0.7, 0.2)}, r"sampling\.guidance_interval=\(0\.7, 0\.2\)"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


# ---------------------------------------------------------------------- captions at the price of their text


def text_only(calls: list[Any]) -> list[bool]:
    return [args[0] is None for args, _ in calls]


def without_cache(sampler: Tasks) -> Tasks:
    """The same sampler, every step of which computes everything."""
    model = sampler.model.model

    class Plain(Watch):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if args[0] is not None:
                self.calls = [args]
            return self.model(*self.calls[0], text=kwargs.get("text"))

    sampler.model = Plain(model)
    return sampler


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("guidance", [{}, {"caption_guidance_scale": 2.0}])
def test_a_video_that_does_not_read_is_computed_once(embeds: Any, flow: str, guidance: dict[str, Any]) -> None:
    prompts, null = embeds
    clean = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(9))
    options = {"temperature": 1.0, **guidance}
    sampler = make_sampler(flow, reads_text=False, **options)
    states: list[torch.Tensor] = []
    arguments = (clean, prompts, null, LENGTH, generators(1, 2, 3))
    cached = sampler.caption(*arguments, on_step=lambda s: states.append(s.text))
    passes = 2 if guidance else 1
    assert text_only(sampler.model.calls) == [False, True] * passes + [True] * 3 * passes
    plain_states: list[torch.Tensor] = []
    plain = without_cache(make_sampler(flow, reads_text=False, **options))
    if not guidance:
        arguments = (clean, prompts, null, LENGTH, generators(1, 2, 3))
        expected = plain.caption(*arguments, on_step=lambda s: plain_states.append(s.text))
        assert torch.equal(cached.tokens, expected.tokens)
        for ours, theirs in zip(states, plain_states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("shares", ["questions", "captions", "reads the prompt", "reads text"])
def test_several_texts_about_a_video(embeds: Any, flow: str, shares: str) -> None:
    """They share its pass where it does not depend on them, and are what each is alone."""
    (prompts, null), clean = embeds, torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(9))
    asked = (null if shares == "captions" else prompts)[[0, 0, 0] if shares == "captions" else [0, 1, 2]].repeat(
        2, 1, 1
    )
    options = {"temperature": 1.0, "caption_guidance_scale": 2.0 if shares == "questions" else 1.0}
    model = {"clean_video_reads_prompt": shares in ("captions", "reads the prompt", "reads text")}
    sampler = make_sampler(flow, shares == "reads text", model, **options)
    together = sampler.caption(clean, asked, null, LENGTH, generators(*range(6)))
    passes = text_only(sampler.model.calls).count(False)
    assert passes == {"questions": 2, "captions": 1, "reads the prompt": 3, "reads text": 12}[shares]
    for row in range(6):
        video = clean[row // 3 : row // 3 + 1]
        alone = sampler.caption(video, asked[row : row + 1], null, LENGTH, generators(row)).tokens
        assert torch.equal(alone[0], together.tokens[row])
    assert len({tuple(tokens) for tokens in together.tokens.tolist()}) > 4


@pytest.mark.parametrize("flow", FLOWS)
def test_a_video_that_does_not_read_the_prompt_is_the_plain_computation(embeds: Any, flow: str) -> None:
    (prompts, null), clean = embeds, torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(9))
    sampler = make_sampler(flow, False, {"clean_video_reads_prompt": False}, temperature=1.0)
    cached = sampler.caption(clean, prompts, null, LENGTH, generators(1, 2, 3)).tokens
    plain = without_cache(sampler).caption(clean, prompts, null, LENGTH, generators(1, 2, 3)).tokens
    assert torch.equal(cached, plain)
    assert torch.equal(sampler.model.calls[0][2], null.expand(3, -1, -1))


@pytest.mark.parametrize(("refresh", "expected"), [(1, "vvvvv"), (2, "vtvtv"), (9, "vtttt")])
def test_a_video_that_reads_is_computed_every_so_many_steps(embeds: Any, refresh: int, expected: str) -> None:
    sampler, (prompts, null) = make_sampler(caption_refresh=refresh, caption_steps=5), embeds
    sampler.caption(torch.randn(3, *SHAPE), prompts, null, LENGTH, generators(1, 2, 3))
    assert "".join("vt"[alone] for alone in text_only(sampler.model.calls)) == expected


def test_refreshing_at_every_step_is_no_approximation(embeds: Any) -> None:
    prompts, null = embeds
    clean = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(9))
    tokens = {}
    for name, sampler in (
        ("k=1", make_sampler("embedding", temperature=1.0)),  # at 0 a step's state depends on the likeliest token only
        ("plain", without_cache(make_sampler("embedding", temperature=1.0))),
        ("k=4", make_sampler("embedding", temperature=1.0, caption_refresh=4)),
    ):
        states: list[torch.Tensor] = []
        sampler.caption(clean, prompts, null, LENGTH, generators(1, 2, 3), lambda s, keep=states: keep.append(s.text))
        tokens[name] = states[-2]  # the last one holds whole rows of the table
    assert torch.equal(tokens["k=1"], tokens["plain"])
    assert not torch.allclose(tokens["k=4"], tokens["plain"], atol=1e-4)


def test_caption_guidance_moves_away_from_the_contrast(embeds: Any) -> None:
    prompts, null = embeds
    clean = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(9))

    def logits(**options: Any) -> torch.Tensor:
        sampler, seen = make_sampler(caption_steps=1, **options), []
        step = sampler.text_flow.step
        object.__setattr__(
            sampler.text_flow, "step", lambda x, logits, *rest: (seen.append(logits), step(x, logits, *rest))[1]
        )
        sampler.caption(clean, prompts, null, LENGTH, generators(1, 2, 3))
        return seen[0]

    plain, two, three = (logits(caption_guidance_scale=scale) for scale in (1.0, 2.0, 3.0))
    assert (two - plain).abs().max() > 1e-3
    torch.testing.assert_close(three - two, two - plain, rtol=1e-4, atol=1e-4)
    unguided = make_sampler(caption_steps=1, caption_guidance_scale=2.0)  # no prompt to guide towards
    unguided.caption(clean, null.expand_as(prompts), null, LENGTH, generators(1, 2, 3))
    assert len(unguided.model.calls) == 1


def test_a_finished_caption_stops_and_is_padded(embeds: Any) -> None:
    eos, pad = 1, 0
    sampler, (prompts, null) = make_sampler(caption_steps=40, text_order="confidence"), embeds
    sampler.eos_token_id, sampler.pad_token_id = eos, pad
    inner = sampler.model.model

    class Sure(Watch):
        """A model that knows the text: 5 6 <eos>, and nothing of what follows."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(*args, **kwargs)
            output.text = torch.zeros_like(output.text)
            for position, token in enumerate((5, 6, eos)):
                output.text[:, position, token] = 50.0
            return output

    sampler.model = Sure(inner)
    seen: list[StepState] = []
    tokens = sampler.caption(torch.randn(3, *SHAPE), prompts, null, LENGTH, generators(1, 2, 3), seen.append).tokens
    assert tokens.tolist() == [[5, 6, eos, pad, pad, pad]] * 3
    assert len(sampler.model.calls) == 3  # one token a step until 5 6 <eos> is revealed
    # what is shown of the last step is the finished text, and that it is the last
    assert [(state.step, state.num_steps, state.last) for state in seen] == [
        (0, 40, False),
        (1, 40, False),
        (2, 40, True),
    ]
    assert torch.equal(seen[-1].text, tokens)


@pytest.mark.parametrize("task", ["generate", "edit", "caption", "joint", "lagging"])
def test_the_last_step_says_so(embeds: Any, task: str) -> None:
    sampler, (prompts, null) = make_sampler(joint_lag=2 if task == "lagging" else 0), embeds
    seen: list[StepState] = []
    common = {"generator": generators(1, 2, 3), "on_step": seen.append}
    if task == "generate":
        sampler.generate(prompts, null, SHAPE, **common)
    elif task == "edit":
        sampler.edit(torch.randn(3, *SHAPE), 0.9, prompts, null, **common)
    elif task == "caption":
        sampler.caption(torch.randn(3, *SHAPE), prompts, null, LENGTH, **common)
    else:
        sampler.joint(prompts, null, SHAPE, LENGTH, **common)
    assert len(seen) > 1 and [state.last for state in seen] == [False] * (len(seen) - 1) + [True]


# ---------------------------------------------------------------------- other ways to make video


def test_guidance_only_in_its_interval(embeds: Any) -> None:
    sampler = make_sampler(solver="euler", num_inference_steps=4, guidance_interval=(0.05, 0.3))
    sampler.generate(*embeds, SHAPE, generators(1, 2, 3))
    # times of the steps with shift 3: 0, 0.1, 0.25, 0.5
    assert [args[2][0].equal(embeds[1][0]) for args, _ in sampler.model.calls] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]


def test_a_scheduler_may_evaluate_twice_a_step(embeds: Any) -> None:
    sampler = make_sampler(guidance_scale=1.0)
    sampler.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    assert sampler.joint(*embeds, SHAPE, LENGTH, generators(1, 2, 3)).tokens.shape == (3, LENGTH)
    assert len(sampler.model.calls) == 5


def test_edit_starts_between_the_video_and_noise(embeds: Any) -> None:
    prompts, null = embeds
    clean = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(9))
    options = {"solver": "euler", "num_inference_steps": 4, "guidance_scale": 1.0}
    noise = torch.stack([torch.randn(SHAPE, generator=g) for g in generators(1, 2, 3)])
    for strength, start in ((1.0, 0.0), (0.8, 0.1), (0.75, 0.25), (0.1, 0.5)):
        sampler = make_sampler(**options)
        sampler.edit(clean, strength, prompts, null, generators(1, 2, 3))
        first = sampler.model.calls[0][0]
        torch.testing.assert_close(first[0], (1 - start) * noise + start * clean)
        torch.testing.assert_close(first[1], torch.full((3,), 1000 * (1 - start)))
    whole = make_sampler(**options).generate(prompts, null, SHAPE, generators(1, 2, 3)).latents
    edited = make_sampler(**options).edit(clean, 1.0, prompts, null, generators(1, 2, 3)).latents
    torch.testing.assert_close(edited, whole)
    for strength in (0.0, 1.2):
        with pytest.raises(ValueError, match=f"strength={strength}"):
            make_sampler().edit(clean, strength, prompts, null)


def test_an_image_is_a_video_of_one_frame(embeds: Any) -> None:
    sampler, shape = make_sampler(), (tiny.CHANNELS, 1, 4, 6)
    image = sampler.generate(*embeds, shape, generators(1, 2, 3)).latents
    assert image.shape == (3, *shape)
    assert sampler.caption(image, embeds[1], embeds[1], LENGTH, generators(1, 2, 3)).tokens.shape == (3, LENGTH)
