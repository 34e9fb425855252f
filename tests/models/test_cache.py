"""The cache: exact where it promises to be, an approximation elsewhere, and never silently another batch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny
from univigu.flow.text import TextInputs
from univigu.models.cache import AttentionCache
from univigu.models.transformer import UniViGUTransformer3DModel

VOCAB, LENGTH, BATCH = 11, 7, 3


def make(flow: str = "mask", dtype: torch.dtype = torch.float32, **options: Any) -> UniViGUTransformer3DModel:
    return tiny.make_unified(tiny.make_wan(), VOCAB, text_flow=flow, **options).to(dtype)


def draw_text(seed: int, flow: str = "mask") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if flow == "embedding":
        return torch.randn(BATCH, LENGTH, tiny.HEADS * tiny.HEAD_DIM, generator=generator)
    return torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)


def draw_video(seed: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean latents, their timestep, prompt embeddings."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(BATCH, tiny.CHANNELS, 2, 4, 6, generator=generator).to(dtype)
    return latents, torch.zeros(BATCH), torch.randn(BATCH, 5, tiny.TEXT_DIM, generator=generator).to(dtype)


def times(value: float) -> torch.Tensor:
    return torch.full((BATCH,), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flow", ["embedding", "uniform", "mask"])
@torch.no_grad()
def test_text_beside_a_cached_clean_video_is_exact(flow: str, dtype: torch.dtype) -> None:
    model, video = make(flow, dtype, clean_video_reads_text=False, clean_video_timestep=250.0), draw_video(dtype=dtype)
    cache = AttentionCache()
    first = model(*video, TextInputs(draw_text(0, flow), times(1000.0)), cache=cache)
    plain = model(*video, TextInputs(draw_text(0, flow), times(1000.0)))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(first.text, plain.text, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first.sample, plain.sample, rtol=tolerance, atol=tolerance)
    for step in (1, 2):
        text, time = draw_text(step, flow), times(1000.0 - 300 * step)
        cached = model(None, None, None, TextInputs(text, time), cache=cache)
        assert cached.sample is None and cached.text.dtype == plain.text.dtype
        torch.testing.assert_close(
            cached.text, model(*video, TextInputs(text, time)).text, rtol=tolerance, atol=tolerance
        )
    # negative controls: another video's cache, another prompt's
    for changed in (draw_video(4)[0], video[0]):
        other = AttentionCache()
        prompt = video[2] if changed is not video[0] else draw_video(4)[2]
        model(changed.to(dtype), video[1], prompt.to(dtype), TextInputs(text, time), cache=other)
        wrong = model(None, None, None, TextInputs(text, time), cache=other).text
        assert (wrong - cached.text).abs().max() > max(2 * tolerance, 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["shared", "own"])
def test_with_hidden_tokens_positions_and_a_shared_ffn(attention: str) -> None:
    options = {"separate_text_ffn": False, "text_positions": LENGTH}
    model = make(clean_video_reads_text=False, text_attention=attention, **options)
    if attention != "shared":
        for block in model.blocks:
            torch.nn.init.normal_(block.attn1_t.to_v.weight, std=0.3)
    video, cache = draw_video(), AttentionCache()
    mask = torch.arange(LENGTH)[None] < torch.tensor([[7], [4], [1]])
    model(*video, TextInputs(draw_text(0), times(900.0), mask), cache=cache)
    text, time = draw_text(1), times(400.0)
    cached = model(None, None, None, TextInputs(text, time, mask), cache=cache).text
    torch.testing.assert_close(cached, model(*video, TextInputs(text, time, mask)).text, rtol=1e-5, atol=1e-5)
    assert (cached - model(*video, TextInputs(text, time)).text).abs().max() > 1e-3


@torch.no_grad()
def test_with_some_positions_of_a_slot() -> None:
    model, video, cache = make(clean_video_reads_text=False, text_positions=LENGTH), draw_video(), AttentionCache()
    positions = torch.tensor([[0, 1, 4], [2, 5, 6], [1, 3, 6]])

    def some(i: int, time: float) -> TextInputs:
        return TextInputs(draw_text(i)[:, :3], times(time), positions=positions)

    model(*video, some(0, 900.0), cache=cache)
    cached = model(None, None, None, some(1, 400.0), cache=cache).text
    expected = model(*video, some(1, 400.0)).text
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)
    elsewhere = model(None, None, None, TextInputs(draw_text(1)[:, :3], times(400.0)), cache=cache).text
    assert (elsewhere - cached).abs().max() > 1e-4


@torch.no_grad()
def test_where_video_reads_text_it_is_an_approximation() -> None:
    model, video, cache = make(), draw_video(), AttentionCache()
    model(*video, TextInputs(draw_text(0), times(1000.0)), cache=cache)
    same = model(None, None, None, TextInputs(draw_text(0), times(1000.0)), cache=cache).text
    torch.testing.assert_close(same, model(*video, TextInputs(draw_text(0), times(1000.0))).text, rtol=1e-5, atol=1e-5)
    text, time = draw_text(1), times(500.0)
    full = model(*video, TextInputs(text, time)).text
    assert (model(None, None, None, TextInputs(text, time), cache=cache).text - full).abs().max() > 1e-4  # stale
    model(*video, TextInputs(text, time), cache=cache)  # refreshed
    torch.testing.assert_close(
        model(None, None, None, TextInputs(text, time), cache=cache).text, full, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_the_prompts_keys_are_computed_once_for_video_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (latents, _, prompt), cache = make(), draw_video(), AttentionCache()
    expected = [model(latents, times(t), prompt).sample for t in (900.0, 500.0)]
    layer, calls = model.blocks[0].attn2.to_k, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    for t, sample in zip((900.0, 500.0), expected, strict=True):
        assert torch.equal(model(latents, times(t), prompt, cache=cache).sample, sample)
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("attention", ["shared", "own"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_pass_of_the_video_alone_serves_its_texts(attention: str, count: int) -> None:
    """Each under its own prompt; of the last block the video computes only its keys and values."""
    options = {"clean_video_timestep": 250.0, "clean_video_reads_text": False, "clean_video_reads_prompt": False}
    model, (latents, clean, null) = make(text_attention=attention, **options), draw_video()
    prompts = torch.randn(count * BATCH, 5, tiny.TEXT_DIM, generator=torch.Generator().manual_seed(5))
    last, calls = model.blocks[-1], {}
    names = ("attn1.to_q", "attn1.to_k", "attn1.to_out.0", "attn2.to_q", "ffn", "attn1_t.to_k")
    for name in names if attention != "shared" else names[:-1]:
        last.get_submodule(name).register_forward_hook(
            lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})
        )
    cache = AttentionCache(text_tokens=LENGTH)
    assert model(latents, clean, null, cache=cache, predict_video=False).sample is None
    assert calls == {"attn1.to_k": 1} | ({} if attention == "shared" else {"attn1_t.to_k": 1})
    for step in range(2):
        tokens = torch.cat([draw_text(2 * step + number) for number in range(count)])
        text = TextInputs(tokens, torch.full((len(tokens),), 900.0 - 300 * step), prompt_embeds=prompts)
        cached = model(None, None, None, text, cache=cache).text
        repeated = (x.repeat_interleave(count, dim=0) for x in (latents, clean, null))
        expected = model(*repeated, text).text
        torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)
        other = model(None, None, None, text._replace(prompt_embeds=prompts.flip(0)), cache=cache).text
        assert (other - expected).abs().max() > 1e-4


@torch.no_grad()
def test_text_without_the_videos_output_is_the_same() -> None:
    model, video, text = make(), draw_video(), TextInputs(draw_text(0), times(700.0))
    ffn: list[int] = []
    model.blocks[-1].ffn.register_forward_hook(lambda *_: ffn.append(1))
    expected = model(*video, text)
    assert len(ffn) == 1
    found = model(*video, text, predict_video=False)
    assert len(ffn) == 1 and found.sample is None
    torch.testing.assert_close(found.text, expected.text, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_time_for_each_token() -> None:
    """As Wan2.2 5B's pipeline gives it, with cached prompts and beside text."""
    model, (latents, _, prompt) = make(), draw_video()
    each = torch.linspace(0, 900, 12).expand(BATCH, -1)
    expected = model(latents, each, prompt).sample
    assert torch.equal(tiny.make_wan()(latents, each, prompt).sample, expected)
    torch.testing.assert_close(model(latents, each, prompt, cache=AttentionCache()).sample, expected)
    text = TextInputs(draw_text(0), times(700.0))
    equal = [model(latents, time, prompt, text) for time in (times(300.0), times(300.0)[:, None].expand(-1, 12))]
    torch.testing.assert_close(equal[0].sample, equal[1].sample, rtol=1e-5, atol=1e-5)
    assert (model(latents, each, prompt, text).sample - equal[0].sample).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("attention", ["shared", "own"])
def test_fused_projections(attention: str) -> None:
    model, video, cache = make(clean_video_reads_text=False, text_attention=attention), draw_video(), AttentionCache()
    expected = model(*video, TextInputs(draw_text(1), times(300.0))).text
    model.fuse_qkv_projections()
    model(*video, TextInputs(draw_text(0), times(1000.0)), cache=cache)
    cached = model(None, None, None, TextInputs(draw_text(1), times(300.0)), cache=cache).text
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)


def test_misuse_is_named() -> None:
    model, (latents, clean, prompt), text = make(), draw_video(), draw_text(0)
    with pytest.raises(ValueError, match="no gradients"):
        model(latents, clean, prompt, TextInputs(text, times(1.0)), cache=AttentionCache())
    with torch.no_grad():
        for empty in (None, AttentionCache()):
            with pytest.raises(ValueError, match="a cache filled by a pass"):
                model(None, None, None, TextInputs(text, times(1.0)), cache=empty)
        cache = AttentionCache()
        model(latents, clean, prompt, cache=cache)  # holds the prompt, not the video
        with pytest.raises(ValueError, match="a cache filled by a pass"):
            model(None, None, None, TextInputs(text, times(1.0)), cache=cache)
        model(latents, clean, prompt, TextInputs(text, times(1.0)), cache=cache)
        with pytest.raises(ValueError, match="another prompt's embeddings"):
            model(latents, clean, prompt + 1e-3, TextInputs(text, times(1.0)), cache=cache)
        model(latents, clean, prompt.clone(), TextInputs(text, times(1.0)), cache=cache)  # a copy is no other prompt
        with pytest.raises(ValueError, match=r"shape \[3, 5\]: the cache has room for 7 tokens"):
            model(None, None, None, TextInputs(text[:, :5], times(1.0)), cache=cache)
        with pytest.raises(ValueError, match="clean video that does not read text"):
            model(latents, clean, prompt, cache=AttentionCache(text_tokens=7), predict_video=False)
        alone = make(clean_video_reads_text=False)
        with pytest.raises(ValueError, match="clean video that does not read text"):
            alone(latents, clean + 1, prompt, cache=AttentionCache(text_tokens=7), predict_video=False)
        with pytest.raises(ValueError, match=r"fills a cache, AttentionCache\(text_tokens"):
            alone(latents, clean, prompt, predict_video=False)
        own = TextInputs(text, times(1.0), prompt_embeds=prompt)
        with pytest.raises(ValueError, match="prompt_embeds: with a cache"):
            alone(latents, clean, prompt, own, cache=AttentionCache())
