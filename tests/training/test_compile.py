"""Compiled blocks compute what others do, in training and in prediction; the VAE's options reach it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.tasks import Tasks
from univigu.data.video import to_model_range
from univigu.flow.text import TextInputs
from univigu.models.encode import Conventions, encode_clips
from univigu.models.foundation import Foundation
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.sampling.options import SamplingOptions
from univigu.shapes.renderer import render
from univigu.shapes.scenes import sample_scene
from univigu.training.module import UniViGU

VOCAB = 11


def make(backend: str | None) -> UniViGUTransformer3DModel:
    options = {"clean_video_reads_text": False, "clean_video_reads_prompt": False}
    model = tiny.make_unified(tiny.make_wan(), VOCAB, text_flow="mask", **options)
    if backend is not None:
        model.compile_repeated_blocks(backend=backend)
    assert all((block._compiled_call_impl is None) == (backend is None) for block in model.blocks)
    return model


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, tiny.CHANNELS, 2, 4, 6, generator=generator)
    prompt = torch.randn(2, 5, tiny.TEXT_DIM, generator=generator)
    return latents, prompt, torch.randint(VOCAB, (2, 7), generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "eager"])  # neither needs a C++ compiler
def test_compiled_blocks_compute_the_same(backend: str) -> None:
    """A training step with its own backward pass, and every task."""
    work = train if backend == "aot_eager" else sample
    with torch.compiler.config.patch(fail_on_recompile_limit_hit=True):  # else the rest is not compiled
        plain, compiled = work(make(None)), work(make(backend))
    assert plain.keys() == compiled.keys() and len(plain) > (30 if work is train else 5)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def train(model: UniViGUTransformer3DModel) -> dict[str, torch.Tensor]:
    """Outputs and gradients."""
    latents, prompt, text = inputs()
    out = model(latents, torch.tensor([0.0, 300.0]), prompt, TextInputs(text, torch.tensor([700.0, 300.0])))
    (out.sample.square().mean() + out.text.square().mean()).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {**gradients, "sample": out.sample, "text": out.text}


def sample(model: UniViGUTransformer3DModel) -> dict[str, torch.Tensor]:
    """What each task makes."""
    latents, prompt, _ = inputs()
    options = SamplingOptions(caption_steps=3, num_inference_steps=2, guidance_scale=2.0)
    sampler, generator = Tasks(model, tiny.make_pipeline().scheduler, options), torch.Generator().manual_seed(1)
    found = {"caption": sampler.caption(latents, prompt, prompt[:1], 7, generator).tokens}
    joint = sampler.joint(prompt, prompt[:1], latents.shape[1:], 7, generator)
    found |= {"joint": joint.tokens, "video": joint.latents}
    found["answers"] = sampler.caption(latents[:1], prompt, prompt[:1], 7, generator).tokens
    found["generate"] = sampler.generate(prompt, prompt[:1], latents.shape[1:], generator).latents
    found["edit"] = sampler.edit(latents, 0.5, prompt, prompt[:1], generator).latents
    return found


def test_the_module_compiles_and_keeps_the_weights_names(foundation: str) -> None:
    module = UniViGU(foundation, compile_blocks=True)
    module.compile_backend = "eager"
    module.configure_model()
    assert module.transformer is not None
    assert all(block._compiled_call_impl is not None for block in module.transformer.blocks)
    plain = UniViGU(foundation)
    plain.configure_model()
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert all(block._compiled_call_impl is None for block in plain.transformer.blocks)  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"vae_tiling": True}])
def test_the_vaes_options_reach_it(options: dict[str, Any], foundation: str) -> None:
    vae = UniViGU(foundation, **options).foundation.vae
    assert (vae.use_slicing, vae.use_tiling) == (bool(options),) * 2


@pytest.mark.slow
@torch.no_grad()
def test_slices_are_exact_and_tiles_nearly(foundation: str) -> None:
    vae = Foundation(foundation).vae
    clips = torch.stack([render(sample_scene(seed), 96, 160, 5) for seed in range(2)])
    latents = encode_clips(vae, to_model_range(clips))
    whole = Conventions().decode(vae, latents)
    vae.enable_slicing()
    torch.testing.assert_close(Conventions().decode(vae, latents), whole, rtol=1e-4, atol=1e-4)
    vae.enable_tiling(64, 64, 48, 48)
    difference = (Conventions().decode(vae, latents) - whole).abs().mean()
    assert 1e-4 < difference < 0.1 * whole.abs().mean()


@pytest.mark.slow
def test_blocks_are_recomputed_with_the_code_of_their_size(tmp_path: Path) -> None:
    """A step's tasks differ in size; checkpointing recomputes them when all have run."""
    tiny.make_pipeline().save_pretrained(tmp_path)
    module = UniViGU(str(tmp_path), compile_blocks=True, gradient_checkpointing=True)
    module.compile_backend = "aot_eager"
    module.configure_model()
    assert module.transformer is not None
    model, loss = module.transformer.train(), torch.zeros(())
    for batch, length in ((1, 7), (2, 7), (1, 9)):
        latents, prompt = torch.randn(batch, tiny.CHANNELS, 2, 4, 6), torch.randn(batch, 5, tiny.TEXT_DIM)
        text = TextInputs(torch.randint(VOCAB, (batch, length)), torch.full((batch,), 700.0))
        out = model(latents, torch.full((batch,), 300.0), prompt, text)
        loss = loss + out.sample.square().mean() + out.text.square().mean()
    loss.backward()  # torch's CheckpointError, where one size was recomputed with another's code
    assert model.blocks[0].ffn.net[2].weight.grad is not None
