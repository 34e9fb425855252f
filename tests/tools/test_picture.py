"""The moving picture of joint samples, made by a small untrained text stream beside the shipped generator."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageFont, ImageSequence

from tools import picture


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_it_moves_and_shows_text(kind: str, untrained_model: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / f"joint.{kind}"
    options = ["--model", untrained_model, "--output", str(output), "--steps", "4"]
    assert picture.main([*options, "--prompt", "a large red circle staying still", "a ring"]) == 0
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(output))]
    width = frames[0].width // 2
    assert len(frames) == 2 * 7 + 2 * 9 and frames[0].height > width  # seven pairs before the last, played twice

    def text(frame: Image.Image, side: int) -> bytes:
        return frame.crop((side * width, width, (side + 1) * width, frame.height)).tobytes()

    def video(frame: Image.Image, side: int) -> bytes:
        return frame.crop((side * width, 0, (side + 1) * width, width)).tobytes()

    for side in (0, 1):
        assert video(frames[0], side) != video(frames[-1], side)
        assert text(frames[0], side) != text(frames[-1], side)


def test_words_and_masks_are_drawn_and_padding_is_not() -> None:
    frame, font = Image.new("RGB", (picture.SIDE, picture.SIDE), "white"), ImageFont.load_default(picture.FONT)

    def drawn(*words: str) -> bytes:
        return picture.panel(frame, {"words": words}, font).tobytes()

    blank = drawn()
    assert set(blank) == {255} and drawn("\u200b", "■") == blank
    assert len({blank, drawn(" red"), drawn(""), drawn(" red", ""), drawn(" red", " ring")}) == 5


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert picture.main(["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "x.gif")]) == 2
    assert "nowhere" in capsys.readouterr().err
