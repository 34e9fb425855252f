"""What users of diffusers expect of a pipeline and of a transformer, beyond the tasks themselves."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    BitsAndBytesConfig,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PipelineQuantizationConfig,
    TorchAoConfig,
    WanPipeline,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.utils import is_bitsandbytes_available
from PIL import Image

from tests import tiny
from tests.test_pipeline import QUICK, READ, SIZE, make_pipe, seeds
from univigu.flow.text import TextInputs
from univigu.models.encode import to_pixels
from univigu.models.lora import LoraOptions, add_lora
from univigu.models.transformer import UniViGUTransformer3DModel
from univigu.pipeline import UniViGUPipeline


@pytest.fixture(scope="module")
def pipe() -> UniViGUPipeline:
    return make_pipe()


@pytest.fixture(scope="module")
def folder(pipe: UniViGUPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(path)
    return path


# ---------------------------------------------------------------------- forms of videos

CLIP = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
RGB = torch.from_numpy(CLIP).permute(3, 0, 1, 2).float()[None] / 127.5 - 1
OPAQUE = np.concatenate([CLIP, np.full_like(CLIP[..., :1], 255)], axis=-1)


@pytest.mark.parametrize(
    "video",
    [
        CLIP,
        CLIP.astype(np.float64) / 255,
        CLIP.transpose(0, 3, 1, 2),
        torch.from_numpy(CLIP),
        torch.from_numpy(CLIP.transpose(0, 3, 1, 2)),
        torch.from_numpy(CLIP).permute(0, 3, 1, 2).float() / 255,
        OPAQUE,
        torch.from_numpy(OPAQUE).permute(0, 3, 1, 2),
        CLIP[None],
        list(CLIP),
        [CLIP],
        list(torch.from_numpy(CLIP)),
        CLIP[:, ::-1][:, ::-1],
    ],
)
def test_every_form_of_a_video_is_the_same_video(video: Any) -> None:
    torch.testing.assert_close(to_pixels(video), RGB, rtol=0, atol=1e-6)
    small = to_pixels(video, 16, 24)
    assert small.shape == (1, 3, 5, 16, 24) and torch.equal(small, to_pixels(CLIP, 16, 24))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_images_are_brought_to_rgb(mode: str) -> None:
    images = [Image.fromarray(frame).convert(mode) for frame in CLIP]
    shown = to_pixels(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    assert torch.equal(to_pixels(images), shown) and torch.equal(to_pixels([images, images])[1:], shown)
    assert torch.equal(to_pixels(images[0]), shown[:, :, :1])  # an image is a video of one frame
    assert mode in ("L", "P") or torch.equal(shown, to_pixels(CLIP))


def test_grayscale_is_shown_in_all_channels() -> None:
    gray = to_pixels(CLIP[..., :1])
    assert gray.shape == RGB.shape and torch.equal(gray[:, 0], gray[:, 2])
    torch.testing.assert_close(gray[:, 0], RGB[:, 0])


def test_frames_of_bytes_and_floats_have_one_caption(pipe: UniViGUPipeline) -> None:
    forms = (CLIP, CLIP.astype(np.float32) / 255, torch.from_numpy(CLIP), [Image.fromarray(frame) for frame in CLIP])
    tokens = [pipe.caption(form, generator=seeds(1), temperature=1.0, **READ).tokens for form in forms]
    assert all(torch.equal(tokens[0], other) for other in tokens[1:])
    pixels = [pipe._pixels(form, None, None) for form in (*forms, 255 - CLIP)]
    assert all(torch.equal(pixels[0], other) for other in pixels[1:-1]) and not torch.equal(pixels[0], pixels[-1])


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (CLIP.astype(np.float32), r"floats from 0 to 255, expected \[0, 1\], or uint8"),
        (CLIP / 127.5 - 1, r"floats from -1 to 1, expected \[0, 1\]"),
        (np.full((5, 32, 48, 3), np.nan), "floats from nan to nan"),
        (CLIP.astype(np.int64), "dtype int64, expected uint8 or floats"),
        (torch.from_numpy(CLIP) > 100, r"dtype torch\.bool"),
        (CLIP[..., 0], r"shape \[5, 32, 48\], expected \[F, H, W, C\] or"),
        (CLIP[..., :2], r"shape \[5, 32, 48, 2\], expected .* with 1, 3 or 4 channels"),
        (CLIP[:0], r"shape \[0, 32, 48, 3\], expected \[F, H, W, C\]"),
        ([], "expected a list of PIL images"),
        ("clip.mp4", "str, expected a list of PIL images, an array or a tensor"),
        ([CLIP, CLIP[:, :16]], "several types or shapes"),
        ([CLIP, torch.from_numpy(CLIP)], "several types or shapes"),
    ],
)
def test_other_videos_are_refused_in_one_line(pipe: UniViGUPipeline, video: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^video: .*{message}") as error:
        pipe.caption(video, **READ)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- loading


def test_loading_options_reach_the_transformer(folder: Path) -> None:
    kinds = {"transformer": torch.bfloat16, "default": torch.float16}
    loaded = UniViGUPipeline.from_pretrained(folder, torch_dtype=kinds)
    assert loaded.transformer.proj_out.weight.dtype == torch.bfloat16 and loaded.vae.dtype == torch.float16
    assert loaded.transformer.scale_shift_table_t.dtype == torch.float32
    with pytest.raises(OSError, match=r"pytorch_model\.bin"):  # there are only safetensors
        UniViGUPipeline.from_pretrained(folder, use_safetensors=False)
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):  # as of Wan's own class, which keeps some in float32
        UniViGUPipeline.from_pretrained(folder, low_cpu_mem_usage=False, torch_dtype=torch.float16)
    plain = UniViGUPipeline.from_pretrained(folder, local_files_only=True).transformer.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in make_pipe().transformer.state_dict().items())


def test_a_transformer_in_several_places(folder: Path, tmp_path: Path) -> None:
    """What does not fit goes to the disk; the tasks are the same."""
    place = {"device_map": "auto", "max_memory": {"cpu": "60KB"}, "offload_folder": str(tmp_path)}
    spread = UniViGUTransformer3DModel.from_pretrained(folder / "transformer", **place)
    assert any(parameter.is_meta for parameter in spread.parameters())
    pipes = [
        UniViGUPipeline.from_pretrained(folder, device_map="cpu", **part) for part in ({"transformer": spread}, {})
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    tokens = [pipe.caption(CLIP, generator=seeds(1), **READ).tokens for pipe in pipes]
    assert torch.equal(*tokens)
    frames = [pipe("a red circle", generator=seeds(3), **SIZE, **QUICK).frames for pipe in pipes]
    np.testing.assert_allclose(*frames, atol=1e-5)


def test_quantization_reaches_the_transformer_or_is_refused(folder: Path) -> None:
    def load(backend: Any, source: Path | None) -> UniViGUPipeline:
        quantization = PipelineQuantizationConfig(quant_mapping={"transformer": backend})
        pipe = UniViGUPipeline.from_pretrained(source, quantization_config=quantization, torch_dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    with pytest.raises(ValueError, match="quantization_config: the model that ships"):
        load(TorchAoConfig.__new__(TorchAoConfig), None)
    if not is_bitsandbytes_available():
        with pytest.raises(ImportError, match="bitsandbytes"):
            load(BitsAndBytesConfig(load_in_4bit=True), folder)
    torchao = pytest.importorskip("torchao.quantization")
    quantized = load(TorchAoConfig(torchao.Int8WeightOnlyConfig()), folder)
    for name in ("attn1.to_q", "ffn_t.net.2"):
        assert type(quantized.transformer.blocks[0].get_submodule(name).weight) is not torch.nn.Parameter
    assert quantized.caption(CLIP, **READ).tokens.shape == (1, 12)


def test_a_variant_is_saved_and_loaded(tmp_path: Path) -> None:
    make_pipe().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    loaded = UniViGUPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert loaded.transformer.proj_out.weight.dtype == torch.float16
    with pytest.raises(OSError, match="no file named"):
        UniViGUPipeline.from_pretrained(tmp_path)


def test_prompts_are_encoded_without_a_transformer(pipe: UniViGUPipeline, tmp_path: Path) -> None:
    pipe.transformer.register_to_config(null_condition="zeros")
    try:
        pipe.save_pretrained(tmp_path)
        expected = pipe.encode_prompt("a red circle", max_sequence_length=16)
    finally:
        pipe.transformer.register_to_config(null_condition="encoded")
    alone = UniViGUPipeline.from_pretrained(tmp_path, transformer=None)
    found = alone.encode_prompt("a red circle", max_sequence_length=16)
    assert alone.transformer is None and all(map(torch.equal, found, expected)) and not found[1].any()
    with pytest.raises(ValueError, match="transformer=None: caption needs one"):
        alone.caption(CLIP)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae"])
def test_a_task_names_the_component_that_it_lacks(pipe: UniViGUPipeline, part: str) -> None:
    with pytest.raises(ValueError, match=f"{part}=None: joint needs one"):
        UniViGUPipeline(**(pipe.components | {part: None})).joint("a red circle", **SIZE)


def test_a_wan_pipeline_with_our_transformer_becomes_ours(pipe: UniViGUPipeline, folder: Path) -> None:
    wan = WanPipeline.from_pretrained(folder)
    assert type(wan) is WanPipeline and type(wan.transformer) is type(pipe.transformer)
    ours = UniViGUPipeline.from_pipe(wan)
    assert ours.transformer is wan.transformer and ours.vae is wan.vae
    assert type(DiffusionPipeline.from_pretrained(folder)) is UniViGUPipeline


# ---------------------------------------------------------------------- calls


def test_the_call_shows_its_arguments() -> None:
    shown = inspect.signature(UniViGUPipeline.__call__).parameters
    assert list(shown) == list(inspect.signature(WanPipeline.__call__).parameters) and "guidance_scale" in shown


@pytest.mark.parametrize("task", ["caption", "joint"])
def test_an_interrupt_stops_every_task(pipe: UniViGUPipeline, task: str) -> None:
    seen: list[int] = []

    def stop(pipe: Any, step: int, *_: Any) -> None:
        seen.append(step)
        pipe._interrupt = step == 1

    options = {"callback_on_step_end": stop, "max_sequence_length": 16, "generator": seeds(1)}
    if task == "caption":
        made = pipe.caption(CLIP, caption_steps=9, **options)
    else:
        made = pipe.joint("a red circle", num_inference_steps=9, **SIZE, **options)
    assert seen == [0, 1] and len(made.text) == 1 and int(made.tokens.max()) < pipe.transformer.config.vocab_size
    assert pipe.caption(CLIP, generator=seeds(1), **READ).tokens.shape == (1, 12)  # not interrupted


@pytest.mark.parametrize("with_text", [False, True])
def test_adapters_at_scale_zero_are_none(with_text: bool) -> None:
    torch.manual_seed(0)
    model = tiny.make_unified(tiny.make_wan())
    inputs = [torch.randn(1, tiny.CHANNELS, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, tiny.TEXT_DIM)]
    text = {"text": TextInputs(torch.randint(11, (1, 7)), torch.tensor([400.0]))} if with_text else {}
    with torch.no_grad():
        plain = model(*inputs, **text).sample
        add_lora(model, LoraOptions(rank=2, alpha=2))
        tiny.shake(model.blocks.get_submodule("0.attn1.to_q.lora_B"), 1.0)
        full, none, half = (
            model(*inputs, **text, attention_kwargs={"scale": scale}).sample for scale in (1.0, 0.0, 0.5)
        )
        assert torch.equal(model(*inputs, **text).sample, full)
    torch.testing.assert_close(none, plain, rtol=0, atol=1e-6)
    assert (full - plain).abs().max() > 1e-3 and not torch.equal(half, full) and not torch.equal(half, none)


def test_attention_processors_that_a_caption_cannot_use_are_refused() -> None:
    class Other(WanAttnProcessor):
        pass

    pipe = make_pipe()
    pipe.transformer.set_attn_processor(Other())
    assert pipe("a red circle", **SIZE, **QUICK).frames.shape == (1, 5, 32, 48, 3)
    with pytest.raises(ValueError, match=r"set_attn_processor: Other .* only pipe\(prompt\) uses"):
        pipe.caption(CLIP, **READ)


@pytest.mark.parametrize(
    "config", [FirstBlockCacheConfig(threshold=0.5), MagCacheConfig(num_inference_steps=4, calibrate=True)]
)
def test_caches_of_blocks_work_for_videos_and_are_refused_for_texts(config: Any) -> None:
    pipe, options = make_pipe(), {**SIZE, **QUICK, "num_inference_steps": 4, "guidance_scale": 1.0}
    plain = make_pipe()("a red circle", generator=seeds(1), **options).frames  # diffusers 0.38: no cache after a run
    pipe.transformer.enable_cache(config)
    cached = pipe("a red circle", generator=seeds(1), **options).frames
    assert cached.shape == plain.shape and (config.__class__ is MagCacheConfig) == np.array_equal(cached, plain)
    with pytest.raises(ValueError, match=r"enable_cache: .* disable_cache"):
        pipe.caption(CLIP, **READ)
    pipe.transformer.disable_cache()
    assert pipe.caption(CLIP, **READ).tokens.shape == (1, 12)
