"""Making the embedded foundation: what its text encoder is taught, and that it learns it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools import make_foundation as tool
from univigu.models.encode import encode_prompts
from univigu.shapes.scenes import Object, Scene
from univigu.shapes.texts import prompt_of

FIRST = Object("large", "red", "cross", "left", "slowly", 40, 16)
SECOND = Object("small", "cyan", "ring", "still", "", 20, 44)


def test_each_word_is_labelled_with_its_object() -> None:
    tokenizer = tool.make_tokenizer()
    ids, labels = tool.token_meanings(tokenizer, Scene((FIRST, SECOND), "gray", "above"), 32)
    words = [token.strip("▁") for token in tokenizer.convert_ids_to_tokens(ids.tolist())]
    assert " ".join(words[:22]) == (
        "a large red cross moving left slowly , above a small cyan ring staying still , on a gray background </s> <pad>"
    )
    whose = dict(zip(words, labels[:, 0].tolist(), strict=True))
    assert [whose[word] for word in ("red", "cross", "slowly", "cyan", "still")] == [1, 1, 1, 2, 2]
    assert [whose[word] for word in (",", "above", "gray", "background", "</s>", "<pad>")] == [-100] * 6
    colors = list(tool.OBJECT_FIELDS["color"])
    color = 1 + list(tool.OBJECT_FIELDS).index("color")
    assert labels[words.index("left"), color] == colors.index("red")  # the word says what colour its object has
    assert labels[words.index("ring"), color] == colors.index("cyan")
    assert (labels[:21, -2:] == torch.tensor([2, 1])).all()  # every word, of the whole scene: above, gray
    assert (labels[21:] == -100).all()  # padding is asked nothing

    _, alone = tool.token_meanings(tokenizer, Scene((SECOND,), "white", ""), 32)
    assert alone[:6, 0].tolist() == [0] * 6 and alone[6, 0] == -100 and (alone[:12, -2:] == torch.tensor([0, 2])).all()


@pytest.mark.slow
def test_a_text_encoder_learns_which_object_a_word_describes() -> None:
    torch.manual_seed(0)
    tokenizer = tool.make_tokenizer()
    encoder = tool.make_text_encoder(len(tokenizer))
    untrained = tool.train_text_encoder(tool.make_text_encoder(len(tokenizer)), tokenizer, 1, num_scenes=50)
    accuracies = tool.train_text_encoder(encoder, tokenizer, 200, num_scenes=2500)
    assert set(accuracies) == {"object", "size", "color", "shape", "motion", "speed", "relation", "background"}
    assert min(accuracies.values()) >= 0.97, accuracies
    assert untrained["color"] < 0.5 and untrained["object"] < 0.8
    # and so the same word, in another place, is another embedding
    prompts = [prompt_of(Scene(pair, "gray", "above")) for pair in ((FIRST, SECOND), (SECOND, FIRST))]
    ids = torch.tensor(tokenizer(prompts, padding=True).input_ids)
    red = tokenizer.convert_tokens_to_ids("▁red")
    with torch.no_grad():
        one, other = encode_prompts(encoder, ids, tokenizer.pad_token_id)[ids == red]
    assert (one - other).norm() > 0.2 * one.norm()


@pytest.mark.parametrize("option", ["vae-steps", "text-steps"])
def test_numbers_out_of_range_are_named(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--output", str(tmp_path / "out"), f"--{option}", "0"]) == 2
    assert f"--{option} 0: expected" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_vae_learns_and_its_latents_are_measured() -> None:
    torch.manual_seed(0)
    vae = tool.make_vae()
    clip = tool.clips(0, 1)
    before = tool.vae_loss(vae, clip).item()
    tool.train_vae(vae, 8, num_clips=2, batch_size=1, num_measured=2)
    assert tool.vae_loss(vae, clip).item() < before
    latents = vae.encode(tool.clips(10**6, 2)).latent_dist.mode()
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.tensor(vae.config.latents_mean), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.tensor(vae.config.latents_std), atol=1e-4, rtol=1e-3)
