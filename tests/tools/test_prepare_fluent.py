"""The animated emoji: what file names say, how the splits are held out, and the data set that is written."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import prepare_fluent as tool
from univigu.data.index import index_folder

NAMES = {"🧑‍⚖️": "judge", "👨‍⚖️": "man judge", "👩‍⚖️": "woman judge", "🏄": "person surfing", "🏄‍♂️": "man surfing"}
NAMES |= {"🏄‍♀️": "woman surfing", "👍": "thumbs up", "🎂": "birthday cake"}
GROUP = "People & Body"


@pytest.fixture
def names() -> dict[str, object]:
    def entry(emoji: str, name: str) -> dict[str, object]:
        return {"name": name, "group": GROUP, "skin_tone_support": emoji != "🎂"}

    return {tool.key_of(f"{ord(letter):04x}" for letter in emoji): entry(emoji, name) for emoji, name in NAMES.items()}


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("1f468-1f3fd-200d-2696-fe0f", ("man judge", "judge", "man", "medium")),
        ("1f9d1-200d-2696-fe0f", ("judge", "judge", "person", "yellow")),
        ("1f3c4-1f3ff-200d-2640-fe0f", ("woman surfing", "surfing", "woman", "dark")),
        ("1f3c4-1f3fb", ("person surfing", "surfing", "person", "light")),
        ("1f44d-1f3fc", ("thumbs up", "", "", "medium-light")),
        ("1f382", ("birthday cake", "", "", "")),
        ("1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff", None),  # two people of two tones
        ("1f000", None),
    ],
)
def test_code_points_tell_role_gender_and_tone(
    stem: str, expected: tuple[str, ...] | None, names: dict[str, object]
) -> None:
    found = tool.describe(Path(f"{stem}.webp"), names, {"1f382": ["birthday_cake", "sweet", "candle_light"]})
    assert (found and (found.name, found.role, found.gender, found.tone)) == expected
    if found is not None:
        assert found.group == "people and body"
        assert found.keywords == (("sweet", "candle light") if stem == "1f382" else ())


def test_held_out_triples_have_their_pairs_in_training() -> None:
    roles = [f"role {number}" for number in range(20)]
    everyone = [
        tool.Emoji(Path("x"), role, "people", (), role, gender, tone)
        for role, gender, tone in product(roles, ("man", "woman", "person"), (tool.YELLOW, *tool.TONES.values()))
    ]
    triples = {(e.role, e.gender, e.tone) for e in everyone}
    unseen = tool.held_out(everyone)
    assert 0.15 < len(unseen) / len(triples) < 0.25
    seen = triples - unseen
    for places in ((0, 1), (0, 2), (1, 2)):
        assert {tuple(t[i] for i in places) for t in unseen} <= {tuple(t[i] for i in places) for t in seen}
    single = [e for e in everyone if e.gender == "man" and e.tone == "dark"]
    assert not tool.held_out(single)  # nothing else has those pairs


def test_motion_is_described_by_what_moves() -> None:
    frames = np.zeros((12, 32, 32, 4), np.float32)
    assert tool.motion_of(frames)["amount"] == "nothing"
    for number in range(12):  # a square in the lower right that goes and comes back twice
        frames[number, 24:28, 22 + number % 6 : 26 + number % 6] = 1
    motion = tool.motion_of(frames)
    assert (motion["amount"], motion["place"], motion["cycles"]) == ("very little", "lower right", "one time")


JUDGES = [f"1f468-{tone}-200d-2696-fe0f" for tone in tool.TONES]


def write_package(folder: Path, people: Sequence[str] = JUDGES) -> Path:
    """Animations of 8 frames: a disk that grows, as packed by npm; one picture that does not move."""
    assets = folder / "package" / "assets"
    assets.mkdir(parents=True)
    rows, columns = np.mgrid[:32, :32] - 15.5
    stems = [*people, "1f9d1-200d-2696-fe0f", "1f382"]
    for stem in stems:
        disks = [(np.hypot(rows, columns) < 4 + number) * 255 for number in range(8)]
        pictures = [np.stack([disk, 0 * disk, 0 * disk, disk], -1).astype(np.uint8) for disk in disks]
        images = [Image.fromarray(picture, "RGBA") for picture in pictures]
        images[0].save(assets / f"{stem}.webp", save_all=True, append_images=images[1:], duration=40, lossless=True)
    images[0].save(assets / "1f44d.webp")
    entries = {
        emoji: {"name": name, "group": GROUP, "skin_tone_support": emoji != "🎂"} for emoji, name in NAMES.items()
    }
    (folder / "package" / "data-by-emoji.json").write_text(json.dumps(entries))
    (folder / "package" / "emoji-en-US.json").write_text(json.dumps({"🎂": ["birthday_cake", "candle"]}))
    with tarfile.open(folder / "pack.tgz", "w:gz") as tar:
        tar.add(folder / "package", "package")
    return folder / "pack.tgz"


@pytest.mark.slow
def test_packages_become_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = write_package(tmp_path)
    command = [str(package), "--output", str(tmp_path / "out"), "--size", "32"]
    assert tool.main([*command, "--num-frames", "5"]) == 0
    assert "8 files, 7 animations, 0 skipped" in capsys.readouterr().out
    clips = {split: index_folder(tmp_path / "out" / split)[0] for split in ("train", "val")}
    assert len(clips["train"]) == 3 * len(clips["val"]) == 21
    assert not {ref.key for ref in clips["train"]} & {ref.key for ref in clips["val"]}
    assert {ref.key.rpartition("-")[0] for ref in clips["train"]} == {
        ref.key.rpartition("-")[0] for ref in clips["val"]
    }
    for ref in clips["val"]:
        texts, background = ref.texts(), ref.key.rpartition("-")[2]
        assert texts["prompt"].endswith(f", on a {background} background")
        assert texts["caption"].count(background) >= 2 and 100 < len(texts["caption"].split()) < 220
        frames = ref.video(5, 32, 32).permute(0, 2, 3, 1).int()
        corner = np.array(tool.BACKGROUNDS[background])
        assert np.abs(frames[:, 0, 0].numpy() - corner).max() <= 3  # transparent
        assert np.abs(frames[:, 15, 15].numpy() - [255, 0, 0]).max() <= 12  # opaque
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "train").glob("*.tar")}
    assert tool.main([*command, "--num-frames", "5"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "train").glob("*.tar")} == before
    assert tool.main([*command, "--num-frames", "9"]) != 0 and "num_frames=5" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "empty.tgz", "w:gz"):
        pass
    for package, told in (("empty.tgz", "data-by-emoji.json"), ("nowhere.tgz", "nowhere.tgz")):
        assert tool.main([str(tmp_path / package), "--output", str(tmp_path / "out")]) == 2
        assert told in capsys.readouterr().err
    assert tool.main([str(tmp_path), "--output", str(tmp_path / "out"), "--backgrounds", "1"]) == 2
