"""Making a foundation for a data set: tokenizer, what the text encoder learns, and the VAE's latents."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from tools import make_foundation as tool
from univigu.data.index import index_folder
from univigu.data.video import encode_mp4, to_model_range
from univigu.models.tokens import detokenize
from univigu.shapes import renderer, scenes
from univigu.shapes.texts import prompt_of

SIZE = {"num_frames": 9, "height": 64, "width": 64}


def prompts(count: int, split: scenes.Split = "train") -> list[str]:
    return [prompt_of(scenes.sample_scene(seed, split)) for seed in range(count)]


def test_a_tokenizer_knows_the_frequent_words_and_spells_the_others() -> None:
    tokenizer = tool.make_tokenizer(["A man-made lake, and a lake", "das Café: a lake"], num_words=2)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a lake, Café").input_ids)
    assert pieces == ["▁a", "▁lake", ",", "▁", "c", "a", "f", "é", "</s>"]
    whole = tool.make_tokenizer(["A man-made lake"])
    assert whole.convert_ids_to_tokens(whole("man-made").input_ids) == ["▁man-made", "</s>"]
    assert [whole.pad_token_id, whole.eos_token_id, whole.unk_token_id] == [0, 1, 2]
    ids = torch.tensor([whole("a man-made lake!").input_ids])
    assert detokenize(whole, ids) == ["a man-made lake!"]


def test_neighbours_are_labelled_within_the_text_only() -> None:
    ids = torch.tensor([[7, 8, 9, 1, 0, 0]])
    assert tool.neighbours(ids, 1).tolist() == [[8, 9, 1, -100, -100, -100]]
    assert tool.neighbours(ids, -2).tolist() == [[-100, -100, 7, 8, 9, 1]]
    assert tool.neighbours(ids, 4).tolist() == [[-100] * 6]


@pytest.mark.slow
def test_a_text_encoder_learns_what_surrounds_a_word() -> None:
    torch.manual_seed(0)
    train = prompts(1500)
    tokenizer = tool.make_tokenizer(train)
    ids, held = (
        tokenizer(texts, padding=True, return_tensors="pt").input_ids for texts in (train, prompts(100, "val"))
    )
    untrained = tool.train_text_encoder(tool.make_text_encoder(len(tokenizer)), [(ids, 128)], held, 1)
    encoder = tool.make_text_encoder(len(tokenizer))
    accuracies = tool.train_text_encoder(encoder, [(ids, 128), (ids[:64], 16)], held, 100)
    assert list(accuracies) == ["position", "next token", "token 4 further"]
    assert accuracies["next token"] > 0.3 > 0.1 > untrained["next token"], (accuracies, untrained)


@pytest.mark.parametrize("option", ["vae-steps", "decoder-steps", "text-steps", "layers"])
def test_numbers_out_of_range_are_named(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--output", str(tmp_path / "out"), f"--{option}", "0"]) == 2
    assert f"{option.replace('-', '_')}=0: expected" in capsys.readouterr().err and not list(tmp_path.iterdir())


def write_clips(folder: Path, count: int, captions: bool = True) -> None:
    """A data set in the documented format, as plain files."""
    folder.mkdir(parents=True)
    for seed in range(count):
        scene = scenes.sample_scene(seed)
        (folder / f"{seed}.mp4").write_bytes(encode_mp4(renderer.render(scene)))
        texts = {"prompt": prompt_of(scene), "caption": f"this is {prompt_of(scene)}" if captions else ""}
        (folder / f"{seed}.json").write_text(json.dumps(texts))


@pytest.mark.slow
@pytest.mark.parametrize("captions", [True, False])
def test_a_foundation_is_made_from_videos_and_texts(captions: bool, tmp_path: Path) -> None:
    write_clips(tmp_path / "data" / "train", 3, captions)
    write_clips(tmp_path / "data" / "val", 2, captions)
    (tmp_path / "data" / "train" / "2.mp4").write_bytes(b"damaged")
    options = {"data": tmp_path / "data", "output": tmp_path / "out", "layers": 1}
    options |= {"text-steps": 2, "vae-steps": 2, "decoder-steps": 2}
    assert tool.main([text for name, value in options.items() for text in (f"--{name}", str(value))]) == 0
    assert not (tmp_path / "out" / "training").exists()
    made = WanPipeline.from_pretrained(tmp_path / "out")
    assert made.tokenizer.convert_ids_to_tokens(made.tokenizer("circle").input_ids)[0].startswith("▁")
    frames = made("a red circle", height=64, width=64, num_frames=5, num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 5, 3, 64, 64) and frames.isfinite().all()


@pytest.mark.slow
def test_a_vae_learns_and_its_latents_are_rotated_and_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_clips(tmp_path / "train", 2)
    vae, clips = tool.make_vae(), tool.read_clips(index_folder(tmp_path / "train")[0], 2, SIZE)
    video = to_model_range(clips)
    before = tool.vae_loss(vae, video, 3e-4).item()
    tool.train_vae(vae, clips, 8, 3e-4, batch_size=1)
    assert tool.vae_loss(vae, video, 3e-4).item() < before
    with torch.no_grad():
        latents = tool.encode(vae, clips)
        decoded = vae.decode(latents).sample
        tool.rotate_latents(vae, latents)
        rotated = tool.encode(vae, clips)
        torch.testing.assert_close(vae.decode(rotated).sample, decoded, atol=2e-4, rtol=1e-3)
    spread = torch.cov(rotated.transpose(0, 1).flatten(1))
    assert (spread - spread.diag().diag()).abs().max() < 1e-3 * spread.diag().max()
    assert spread.diag().tolist() == sorted(spread.diag().tolist(), reverse=True)
    unrotated = torch.cov(latents.transpose(0, 1).flatten(1))
    assert (unrotated - unrotated.diag().diag()).abs().max() > 0.05 * unrotated.diag().max()
    tool.record_latent_statistics(vae, rotated)
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    torch.testing.assert_close(rotated.mean((0, 2, 3, 4)), mean, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(rotated.std((0, 2, 3, 4)).clamp(min=0.1 * float(std[0])), std, atol=1e-4, rtol=1e-3)
    before = tool.vae_loss(vae, video, 0.0).item()
    tool.train_vae(vae, clips, 8, None, batch_size=1)
    assert tool.vae_loss(vae, video, 0.0).item() < before
    assert tool.encode(vae, clips).equal(rotated), "the decoder's training moved the latents"


def test_an_unfinished_run_is_continued_with_its_own_options_only(tmp_path: Path) -> None:
    def options(seed: int) -> argparse.Namespace:
        return argparse.Namespace(output=tmp_path / "out", seed=seed, vae_steps=3)

    assert tool.start_or_continue(options(0)) == tool.start_or_continue(options(0)) == tmp_path / "out" / "training"
    with pytest.raises(ValueError, match=r"^--seed 1: .*out/training is of an unfinished run with 0; continue that"):
        tool.start_or_continue(options(1))
