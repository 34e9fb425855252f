"""The pretrained components: prompts, latents and the folder they come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from tests import tiny
from univigu.models.encode import Conventions, encode_clips, encode_prompts, normalize_latents
from univigu.models.fingerprint import folder_fingerprint
from univigu.models.foundation import COMPONENTS, Foundation
from univigu.models.tokens import TextTooLongError, clean_text, detokenize, token_count, tokenize

PROMPTS = ["a red circle moves left.", "", "a  small\tblue   square &amp; a green one"]


@pytest.fixture(scope="session")
def pipeline() -> WanPipeline:
    return tiny.make_pipeline()


@pytest.fixture(scope="session")
def folder(pipeline: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foundation")
    pipeline.save_pretrained(path)
    return path


@pytest.mark.parametrize("where", ["tiny", "shipped"])
def test_prompts_are_encoded_as_wan_pipeline_does(folder: Path, foundation: str, where: str) -> None:
    path = folder if where == "tiny" else Path(foundation)
    ours, theirs = Foundation(path), WanPipeline.from_pretrained(path)
    expected = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=32)[0]
    ids = tokenize(ours.tokenizer, PROMPTS, 32)
    with torch.no_grad():
        embeds = encode_prompts(ours.text_encoder, ids, ours.pad_token_id)
    torch.testing.assert_close(embeds, expected, rtol=1e-5, atol=1e-5)
    for row, text in zip(embeds, PROMPTS, strict=True):
        end = token_count(ours.tokenizer, text)
        assert not row[end:].any() and row[:end].abs().sum(-1).min() > 0
    assert token_count(ours.tokenizer, "") == 1  # the empty prompt is its end-of-sequence token


def test_texts_survive_tokenisation(folder: Path) -> None:
    tokenizer = Foundation(folder).tokenizer
    ids = tokenize(tokenizer, PROMPTS, 32)
    assert ids.shape == (3, 32) and ids.dtype == torch.int64
    assert detokenize(tokenizer, ids)[:2] == [PROMPTS[0], ""]
    ids[0, token_count(tokenizer, PROMPTS[0]) :] = ids[0, 0]  # what follows the end is not text
    assert detokenize(tokenizer, ids)[0] == PROMPTS[0]
    full = ids[:1, : token_count(tokenizer, PROMPTS[0]) - 1]
    assert detokenize(tokenizer, full) == [PROMPTS[0]]  # a slot without an end is text to its last token


def test_a_text_fits_exactly_or_is_refused(folder: Path) -> None:
    tokenizer = Foundation(folder).tokenizer
    count = token_count(tokenizer, PROMPTS[0])
    assert tokenize(tokenizer, PROMPTS[:1], count)[0, -1] == tokenizer.eos_token_id
    with pytest.raises(TextTooLongError, match=rf"caption has {count} tokens, over the limit of {count - 1}: 'a red"):
        tokenize(tokenizer, ["", PROMPTS[0]], count - 1, "caption")


def test_latents_are_normalised_as_wan_pipeline_does(pipeline: WanPipeline) -> None:
    vae = pipeline.vae
    latents = torch.randn(2, tiny.CHANNELS, 3, 4, 4)
    torch.testing.assert_close(normalize_latents(latents, vae), (latents - 0.1) / 1.5)
    torch.testing.assert_close(normalize_latents(normalize_latents(latents, vae), vae, inverse=True), latents)
    with torch.no_grad():
        video = Conventions().decode(vae, latents)
        expected = vae.decode(latents / (1.0 / torch.tensor(1.5)) + 0.1).sample
    torch.testing.assert_close(video, expected)
    assert video.shape == (2, 3, 9, 32, 32)


def test_videos_are_encoded_by_the_mode(pipeline: WanPipeline) -> None:
    video = torch.rand(2, 3, 5, 32, 48) * 2 - 1
    with torch.no_grad():
        latents, again = (encode_clips(pipeline.vae, video) for _ in range(2))
        mean = pipeline.vae._encode(video).chunk(2, dim=1)[0]
    assert torch.equal(latents, again) and latents.dtype == torch.float32
    torch.testing.assert_close(latents, (mean - 0.1) / 1.5)
    assert latents.shape == (2, tiny.CHANNELS, 2, 4, 6)


def test_components_are_frozen_and_schedulers_fresh(folder: Path, tmp_path: Path) -> None:
    foundation = Foundation(folder)
    for model in (foundation.vae, foundation.text_encoder):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    first, second = foundation.scheduler(), foundation.scheduler()
    assert type(first) is UniPCMultistepScheduler and first is not second and first.config.flow_shift == 3.0
    shutil.copytree(folder, tmp_path / "other")
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(tmp_path / "other" / "scheduler")
    other = Foundation(tmp_path / "other").scheduler()
    assert type(other) is FlowMatchEulerDiscreteScheduler and other.config.shift == 5.0


@pytest.mark.parametrize("lacking", [("vae",), ("tokenizer", "scheduler"), COMPONENTS])
def test_missing_components_are_named(folder: Path, tmp_path: Path, lacking: tuple[str, ...]) -> None:
    for name in COMPONENTS:
        if name not in lacking:
            (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(FileNotFoundError, match=f"foundation=.*lacks {', '.join(lacking)}$"):
        Foundation(tmp_path)


def test_fingerprint_follows_the_weights_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "vae"
    shutil.copytree(folder / "vae", copied)
    mark = folder_fingerprint(folder / "vae")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "_diffusers_version": "9.9", "_name_or_path": "x"}))
    assert folder_fingerprint(copied) == mark
    (copied / "config.json").write_text(json.dumps({**config, "latents_std": [2.0] * tiny.CHANNELS}))
    assert folder_fingerprint(copied) != mark
    shutil.copy(folder / "vae" / "config.json", copied)
    weights = copied / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert folder_fingerprint(copied) != mark
    for name, target in (("a", folder / "vae"), ("b", copied)):  # linked, as tools/convert.py prune does
        (tmp_path / name).mkdir()
        (tmp_path / name / "vae").symlink_to(target)
    assert folder_fingerprint(tmp_path / "a") != folder_fingerprint(tmp_path / "b")


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "  two\n\tlines \u00a0 of  it ",
        "caf\u00c3\u00a9, \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d",
        "a &lt;b&gt; &amp;amp;lt; c &nbsp;",
        "\ufb01ligree \u2018single\u2019 \x07bell",
        "\u4e00\u53ea\u732b\uff0c\u5728\u8dd1",
        "",
    ],
)
def test_texts_are_cleaned_as_wans_pipeline_does(text: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_text(text) == prompt_clean(text)
