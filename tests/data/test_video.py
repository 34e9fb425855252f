"""What is read of videos: frames of every width, and sizes from headers."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import av
import decord
import pytest
import torch

from tests.conftest import REPO
from univigu.data.video import VideoError, encode_mp4, even_indices, probe_video, read_video
from univigu.shapes import renderer, scenes

NARROW = (2, 4, 6, 8, 12, 16, 24, 48, 72)
"""Widths at which decord pads the rows of its frames and then cannot copy them."""


def clip(height: int, width: int, num_frames: int = 9) -> torch.Tensor:
    return renderer.render(scenes.sample_scene(3), height, width, num_frames)


def test_decord_fails_on_these_widths_and_no_others() -> None:
    """If this fails, another version of decord reads more or less, and the fallback is to be looked at."""
    for width in (*range(2, 132, 2), 200, 272, 416, 480, 832):
        reader = decord.VideoReader(io.BytesIO(encode_mp4(clip(8, width, 1))), num_threads=1)
        if width in NARROW:
            with pytest.raises(decord.DECORDError, match="size must exactly match"):
                reader.get_batch([0])
        else:
            assert reader.get_batch([0]).shape == (1, 8, width, 3)


@pytest.mark.parametrize("width", [*NARROW, 64, 66])
@pytest.mark.parametrize("wanted", [1, 5, 20])
def test_narrow_clips_are_read(width: int, wanted: int) -> None:
    levels = torch.arange(9)[:, None, None, None] * 20 + torch.arange(32)[:, None]  # each frame is brighter
    frames = levels.expand(9, 3, 32, width).to(torch.uint8)
    read = read_video(encode_mp4(frames, crf=0), wanted, 32, width)
    expected = frames[even_indices(9, wanted)]
    assert read.shape == expected.shape
    assert (read.float() - expected.float()).abs().max() <= 2


def test_narrow_clips_are_read_from_files_and_resized(tmp_path: object) -> None:
    path = f"{tmp_path}/narrow.mp4"
    with open(path, "wb") as file:
        file.write(encode_mp4(clip(32, 48)))
    assert read_video(path, 5, 64, 64).shape == (5, 3, 64, 64)


def test_damaged_narrow_clips_are_named() -> None:
    whole = encode_mp4(clip(32, 48, 40))
    for damaged in (whole[: len(whole) // 3], whole[:40], b"x" * 300):
        with pytest.raises(VideoError, match=r"not a readable video|no video|fewer frames"):
            read_video(damaged, 9, 32, 48)


def test_sizes_are_read_from_headers() -> None:
    assert probe_video(io.BytesIO(encode_mp4(clip(34, 50, 7)))) == (34, 50, 7)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:  # its header has no number of frames
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 80, 32, "yuv420p"  # type: ignore[attr-defined]
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame(80, 32, "yuv420p")))  # type: ignore[attr-defined]
        container.mux(stream.encode())  # type: ignore[attr-defined]
    assert probe_video(io.BytesIO(buffer.getvalue())) == (32, 80, 6)
    for damaged in (b"", b"no video" * 50, encode_mp4(clip(32, 64))[:300]):
        with pytest.raises(VideoError):
            probe_video(io.BytesIO(damaged))


READS = """
import sys
from univigu.shapes.renderer import render
from univigu.shapes.scenes import sample_scene
from univigu.data.video import VideoError, encode_mp4, read_video

def resident():  # KiB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

clips = [encode_mp4(render(sample_scene(seed, "train"), 64 + 16 * seed, 64, 9)) for seed in range(3)]
broken = clips[0][: len(clips[0]) // 2]  # decord alone would keep a tenth of a MiB of each
for number in range(int(sys.argv[1])):
    read_video(clips[number % 3], 9, 64, 64)
    if number % 5 == 0:
        try:
            read_video(broken, 9, 64, 64)
        except VideoError:
            pass
    if number == 299:  # what libraries keep for themselves is there by now
        before = resident()
print(resident() - before)
"""


@pytest.mark.slow
def test_memory_stays_flat_over_many_reads() -> None:
    """UNIVIGU_READS=10000 reads as often."""
    count = os.environ.get("UNIVIGU_READS", "1500")
    command = [sys.executable, "-c", READS, count]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert result.returncode == 0, result.stderr
    print(f"{count} reads: {int(result.stdout) / 1024:+.1f} MiB")
    assert int(result.stdout) < 4 * 1024  # with decord alone: 12
