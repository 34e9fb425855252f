"""Inputs that are broken in every way known, for checking that none of them stops the loader or costs a good sample."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from univigu.data.shards import Manifest, sha256_of
from univigu.data.video import encode_mp4
from univigu.shapes import renderer, scenes, texts


def is_intact(folder: Path) -> bool:
    """Whether a folder holds all shards of its manifest, with their checksums."""
    manifest = Manifest.load(folder)
    assert manifest is not None and manifest.complete
    return all(sha256_of(folder / shard.name) == shard.sha256 for shard in manifest.shards)


Members = dict[str, bytes]
"""A sample's members by suffix."""


def good_sample(seed: int) -> Members:
    """A sound clip of the embedded world."""
    scene = scenes.sample_scene(seed)
    description = {"prompt": texts.prompt_of(scene), "caption": texts.caption_of(scene), "scene": scene.to_dict()}
    return {"mp4": encode_mp4(renderer.render(scene)), "json": json.dumps(description).encode()}


def _with_texts(good: Members, **changes: Any) -> Members:
    texts = {**json.loads(good["json"]), **changes}
    return {**good, "json": json.dumps({name: value for name, value in texts.items() if value is not ...}).encode()}


def _wrong_type(rng: random.Random, good: Members) -> Members:
    fields: list[tuple[str, list[Any]]] = [
        ("prompt", [3, None, ["a"], {"text": "a"}, True]),
        ("caption", [1.5, None, [], False]),
        ("qa", ["?", {"question": "?"}, [{"question": "?"}], [3]]),
    ]
    field, values = rng.choice(fields)
    # null is "not there" for the fields that a sample may leave out, and a wrong type for the others
    return _with_texts(good, **{field: rng.choice(values)})


def _corrupt_json(rng: random.Random, good: Members) -> Members:
    text = good["json"]
    raw = [
        text[: rng.randrange(len(text))],
        b"",
        b"\x00" * 40,
        b'{"id": ' + b"9" * 5000 + b"}",  # over the digits that Python reads
        b"[" * 100_000,  # deeper than Python's stack
        text.replace(b'"', b"'"),
        b'{"prompt": "\xe9"}',
        b"NaN,",
    ]
    return {**good, "json": rng.choice(raw)}


def _wrong_extension(rng: random.Random, good: Members) -> Members:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("clip.mp4", good["mp4"])
    text = good["json"]
    return rng.choice(
        [
            {"png": good["mp4"], "json": text},
            {"txt": good["mp4"], "json": text},
            {"mp4": archive.getvalue(), "json": text},
            {"mp4": text, "json": text},
            {"mp4": good["mp4"], "yaml": text},
        ]
    )


@cache
def _audio_only() -> bytes:
    import av
    import numpy as np

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for _ in range(16):
            container.mux(stream.encode(frame))  # type: ignore[attr-defined]
        container.mux(stream.encode())  # type: ignore[attr-defined]
    return buffer.getvalue()


@cache
def _huge(width: int = 9000, height: int = 4000) -> bytes:
    """One frame of 36 million pixels, over the limit, in a small file."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mjpeg", rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"  # type: ignore[attr-defined]
        container.mux(stream.encode(av.VideoFrame(width, height, "yuvj420p")))  # type: ignore[attr-defined]
        container.mux(stream.encode())  # type: ignore[attr-defined]
    return buffer.getvalue()


@cache
def _no_frames() -> bytes:
    """A video file whose table of samples is empty."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"  # type: ignore[attr-defined]
        container.start_encoding()
    return buffer.getvalue()


@cache
def _variable_rate() -> bytes:
    import av

    scene, buffer = scenes.sample_scene(0), io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(30))
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"  # type: ignore[attr-defined]
        stream.codec_context.time_base = Fraction(1, 600)
        for image, time in zip(renderer.render(scene, num_frames=8), (0, 1, 9, 90, 91, 500, 501, 4000), strict=True):
            frame = av.VideoFrame.from_ndarray(image.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 600)
            container.mux(stream.encode(frame))  # type: ignore[attr-defined]
        container.mux(stream.encode())  # type: ignore[attr-defined]
    return buffer.getvalue()


def _noise(rng: random.Random, good: Members) -> Members:
    return {**good, "mp4": rng.randbytes(rng.randrange(1, 20_000))}


DAMAGES: dict[str, Callable[[random.Random, Members], Members]] = {
    "empty-video": lambda rng, good: {**good, "mp4": b""},
    "cut-video": lambda rng, good: {**good, "mp4": good["mp4"][: rng.randrange(1, len(good["mp4"]) // 3)]},
    "text-video": lambda rng, good: {**good, "mp4": b"this is not a video, however long " * rng.randrange(1, 500)},
    "noise-video": _noise,
    "zeroed-video": lambda rng, good: {**good, "mp4": bytes(len(good["mp4"]))},
    "audio-only": lambda rng, good: {**good, "mp4": _audio_only()},
    "no-frames": lambda rng, good: {**good, "mp4": _no_frames()},
    "huge-frames": lambda rng, good: {**good, "mp4": _huge()},
    "no-video": lambda rng, good: {"json": good["json"]},
    "no-json": lambda rng, good: {"mp4": good["mp4"]},
    "wrong-extension": _wrong_extension,
    "corrupt-json": _corrupt_json,
    "json-list": lambda rng, good: {**good, "json": rng.choice([b"[1, 2]", b'"a"', b"3", b"null"])},
    "missing-field": lambda rng, good: _with_texts(good, **{rng.choice(["prompt", "caption"]): ...}),
    "wrong-type": _wrong_type,
    "half-a-character": lambda rng, good: _with_texts(good, **{rng.choice(["prompt", "caption"]): "red \ud83d circle"}),
}
"""What makes a sample unusable, by name."""

ODD: dict[str, Callable[[random.Random, Members], Members]] = {
    "one-frame": lambda rng, good: {**good, "mp4": encode_mp4(renderer.render(scenes.sample_scene(0), num_frames=1))},
    "variable-rate": lambda rng, good: {**good, "mp4": _variable_rate()},
    "odd-size": lambda rng, good: {**good, "mp4": encode_mp4(renderer.render(scenes.sample_scene(0), 18, 202, 40))},
    "unknown-fields": lambda rng, good: _with_texts(good, extra={"a": [1]}, scene={"weather": "fog"}),
    "other-members": lambda rng, good: {**good, "txt": b"notes", "srt": rng.randbytes(100)},
}
"""What looks odd, but can be read."""

SHARD_DAMAGES = ("empty-shard", "text-shard", "cut-shard")


def mutate(rng: random.Random, data: bytes) -> bytes:
    """A file without some of its bytes, with random ones in their place, or with an extreme number in its header."""
    changed, start, length = bytearray(data), rng.randrange(len(data)), rng.randrange(1, 300)
    kind = rng.randrange(3)
    if kind == 0:
        del changed[start : start + length]
    elif kind == 1:
        changed[start : start + length] = rng.randbytes(length)
    else:
        start %= 1500
        changed[start : start + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)])
    return bytes(changed)


@cache
def videos_to_mutate() -> list[bytes]:
    """A small one of each of seven formats."""
    from PIL import Image

    from tests import video_matrix

    first, *others = [Image.new("RGB", (60, 40), (level,) * 3) for level in range(0, 250, 25)]
    files = [good_sample(3)["mp4"]]
    for format in ("gif", "webp"):
        buffer = io.BytesIO()
        first.save(buffer, format, save_all=True, append_images=others)
        files.append(buffer.getvalue())
    stored = video_matrix.encode("mpeg4", video_matrix.B_FRAMES)
    return files + [video_matrix.remux(*stored, name, "whole") for name in ("avi", "matroska", "asf", "3gp")]


def write_raw(path: Path, samples: list[tuple[str, Members]]) -> None:
    """Write a tar file without any of the checks that the package's own writer makes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_damaged(folder: Path, damaged: int, good: int, per_shard: int = 50, seed: int = 0) -> set[str]:
    """Fill a folder with shards in which damaged samples and sound ones are mixed.

    Samples are named by what is wrong with them; every kind has its turn.  Three damaged shards are counted too.

    Args:
        damaged: how many damaged inputs, shards included.
        good: how many sound samples, half of them odd ones.

    Returns:
        the keys of those that can be read.
    """
    rng = random.Random(seed)
    bases = [good_sample(i) for i in range(8)]
    makers = list(DAMAGES.items())
    samples: list[tuple[str, Members]] = []
    for i in range(damaged - len(SHARD_DAMAGES)):
        name, make = makers[i % len(makers)]
        samples.append((f"{name}-{i:05d}", make(rng, rng.choice(bases))))
    for i in range(good):
        name, make = list(ODD.items())[i // 2 % len(ODD)] if i % 2 else ("plain", lambda rng, base: base)
        samples.append((f"good-{name}-{i:05d}", make(rng, rng.choice(bases))))
    rng.shuffle(samples)
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(samples), per_shard)):
        write_raw(folder / f"{number:05d}.tar", samples[start : start + per_shard])
    (folder / "empty-shard.tar").write_bytes(b"")
    (folder / "text-shard.tar").write_bytes(b"no tar file " * 1000)
    write_raw(folder / "cut-shard.tar", [("cut-00000", bases[0])])
    (folder / "cut-shard.tar").write_bytes((folder / "cut-shard.tar").read_bytes()[:1500])
    return {key for key, _ in samples if key.startswith("good")}


def kind_of(shard: str, key: str | None) -> str:
    """The kind of damage that a sample or shard was given."""
    return Path(shard).stem if key is None or key.startswith("cut-0") else key.rpartition("-")[0]
