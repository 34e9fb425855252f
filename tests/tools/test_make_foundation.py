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


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("vae-steps", "0"),
        ("text-steps", "0"),
        ("batch-size", "0"),
        ("num-clips", "-1"),
        ("whole-from", "1.5"),
        ("whole-from", "nan"),
        ("learning-rate", "0.0"),
    ],
)
def test_numbers_out_of_range_are_named(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--output", str(tmp_path / "out"), f"--{option}", value]) == 2
    assert f"--{option} {value}: expected" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_vae_to_start_from_is_looked_at_first(
    foundation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the text encoder's training, which the call would end in otherwise."""
    vae = tool.make_vae()
    vae.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for folder, message in (
        (tmp_path / "nowhere", "no config.json there"),
        (Path(foundation), "no config.json there"),  # the whole foundation instead of its vae/
        (Path(foundation) / "transformer", "holds a WanTransformer3DModel, expected an AutoencoderKLWan"),
        (tmp_path / "cut", "not a readable VAE"),
    ):
        assert tool.main(["--output", str(tmp_path / "out"), "--vae-from", str(folder)]) == 2
        printed = capsys.readouterr()
        assert f"--vae-from {folder}: " in printed.err and message in printed.err
        assert not (tmp_path / "out").exists() and "text encoder" not in printed.out


def test_a_vae_to_start_from_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    theirs = tool.make_vae()
    theirs.save_pretrained(tmp_path / "vae")
    ours = tool.make_vae()
    tool.start_vae_from(ours, tmp_path / "vae")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert f"took {len(ours.state_dict())} of {len(ours.state_dict())} tensors" in capsys.readouterr().out
