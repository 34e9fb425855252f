"""Videos of every codec that FFmpeg writes, in every container, and whether they are read as FFmpeg shows them.

Every frame carries its number.  Each clip is stored as a whole, cut by stream copy between key frames, and with a
start other than zero.  A clip is read rightly if each of nine frames is at most one shown frame off.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np

from univigu.data.video import VideoError, probe_video, read_video

FPS, NUM_FRAMES, CUT = 25, 60, (20, 50)
INTRA, CLOSED, OPEN, B_FRAMES = "all-intra", "closed", "open", "b-frames"


def _options(gop: str, cgop: bool = True) -> dict[str, str]:
    """Of FFmpeg's own encoders."""
    size, b_frames = {INTRA: (1, 0), CLOSED: (12, 0), OPEN: (12, 2), B_FRAMES: (30, 2)}[gop]
    flags = {} if gop == OPEN or not cgop else {"flags": "+cgop", "sc_threshold": "1000000000"}
    return {"g": str(size), "bf": str(b_frames), "b": "2M"} | flags


def _x26x(codec: str, gop: str) -> dict[str, str]:
    size, b_frames, is_open = {INTRA: (1, 0, 0), CLOSED: (12, 0, 0), OPEN: (12, 3, 1), B_FRAMES: (30, 3, 0)}[gop]
    params = f"keyint={size}:min-keyint={size}:bframes={b_frames}:open-gop={is_open}:scenecut=0:b-adapt=0"
    quiet = ":log-level=none" if codec == "x265" else ""
    return {"preset": "veryfast", f"{codec}-params": params + quiet}


def _vpx(gop: str) -> dict[str, str]:
    hidden = {"auto-alt-ref": "1", "lag-in-frames": "16"} if gop == B_FRAMES else {}  # frames that are not shown
    return {"g": "1" if gop == INTRA else "12", "deadline": "realtime", "cpu-used": "5", "b": "1M"} | hidden


def _av1(gop: str) -> dict[str, str]:
    size, structure, refresh = {INTRA: (1, 1, 2), CLOSED: (12, 1, 2), OPEN: (17, 2, 1), B_FRAMES: (30, 2, 2)}[gop]
    return {
        "g": str(size),
        "preset": "10",
        "crf": "15",
        "svtav1-params": f"pred-struct={structure}:irefresh-type={refresh}",
    }


CODECS: dict[str, tuple[str, Any, tuple[str, ...]]] = {  # pixel format, options, groups of pictures
    "libx264": ("yuv420p", lambda gop: _x26x("x264", gop), (INTRA, CLOSED, OPEN, B_FRAMES)),
    "libx265": ("yuv420p", lambda gop: _x26x("x265", gop), (INTRA, CLOSED, OPEN, B_FRAMES)),
    "mpeg4": ("yuv420p", _options, (INTRA, CLOSED, OPEN, B_FRAMES)),
    "mpeg2video": ("yuv420p", _options, (INTRA, CLOSED, OPEN, B_FRAMES)),
    "mpeg1video": ("yuv420p", _options, (INTRA, CLOSED, OPEN, B_FRAMES)),
    "libvpx": ("yuv420p", _vpx, (INTRA, CLOSED, B_FRAMES)),
    "libvpx-vp9": ("yuv420p", _vpx, (INTRA, CLOSED, B_FRAMES)),
    "libsvtav1": ("yuv420p", _av1, (INTRA, CLOSED, OPEN, B_FRAMES)),
    "wmv2": ("yuv420p", lambda gop: _options(gop, False), (INTRA, CLOSED)),
    "msmpeg4v3": ("yuv420p", lambda gop: _options(gop, False), (INTRA, CLOSED)),
    "flv": ("yuv420p", lambda gop: _options(gop, False), (INTRA, CLOSED)),
    "mjpeg": ("yuvj420p", lambda gop: {"b": "4M"}, (INTRA,)),
    "prores_ks": ("yuv422p10le", lambda gop: {}, (INTRA,)),
    "ffv1": ("yuv420p", lambda gop: {"g": "1" if gop == INTRA else "12"}, (INTRA, CLOSED)),
}
CONTAINERS = ("mp4", "mov", "matroska", "webm", "avi", "mpegts", "mpeg", "asf", "flv", "ogg", "nut", "3gp")


def picture(number: int) -> np.ndarray:
    """A frame of 160x96 with its number: ten blocks, black 0 or white 1, lowest bit on the left, over red and blue."""
    image = np.zeros((96, 160, 3), np.uint8)
    image[:48] = np.repeat([255 * (number >> bit & 1) for bit in range(10)], 16)[None, :, None]
    image[48:, :80], image[48:, 80:] = (220, 30, 30), (30, 30, 220)
    return image


def number_of(image: np.ndarray) -> int:
    """The inverse of ``picture``."""
    return sum(int(image[12:36, 16 * bit + 4 : 16 * bit + 12].mean() > 127) << bit for bit in range(10))


def encode(codec: str, gop: str) -> tuple[bytes, list[tuple[int, int]]]:
    """All frames in a container that holds every codec, and (pts, dts) of its packets in frames."""
    buffer, stamps = io.BytesIO(), []
    pixels, options, _ = CODECS[codec]
    with av.open(buffer, "w", format="mov" if codec == "prores_ks" else "nut") as container:
        stream: Any = container.add_stream(codec, rate=FPS, options=options(gop))
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 160, 96, pixels, 1
        pictures = [av.VideoFrame.from_ndarray(picture(number), format="rgb24") for number in range(NUM_FRAMES)]
        for frame in (*pictures, None):
            for packet in stream.encode(frame):
                stamps.append((round(packet.pts * packet.time_base * FPS), round(packet.dts * packet.time_base * FPS)))
                container.mux(packet)
    return buffer.getvalue(), stamps


def remux(clip: bytes, stamps: list[tuple[int, int]], container: str, cut: str) -> bytes:
    """Copy the packets into a container: "whole", "trimmed" to ``CUT``, or with an "offset" of five seconds."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip)) as source, av.open(buffer, "w", format=container) as target:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        first, stop, shift = 0, len(packets), 5 * FPS if cut == "offset" else 0
        if cut == "trimmed":
            shift = -CUT[0]
            first = max(n for n, packet in enumerate(packets) if packet.is_keyframe and stamps[n][0] <= CUT[0])
            stop = next(n for n, (pts, _) in enumerate(stamps) if pts >= CUT[1])
        out = target.add_stream_from_template(stream, opaque=True)
        if container in ("mpegts", "mpeg"):  # which have no header
            dump = av.BitStreamFilterContext("dump_extra", stream)
            packets = [dump.filter(packet)[0] for packet in packets]
        for packet, (pts, dts) in list(zip(packets, stamps, strict=True))[first:stop]:
            packet.time_base, packet.pts, packet.dts = Fraction(1, FPS), pts + shift, dts + shift
            packet.stream = out
            target.mux(packet)
    return buffer.getvalue()


def shown(data: bytes) -> tuple[list[int], list[float]]:
    """Numbers and times of the frames that FFmpeg gives when it decodes from the start."""
    with av.open(io.BytesIO(data)) as container:
        frames = [(number_of(f.to_ndarray(format="rgb24")), f.time) for f in container.decode(video=0)]
    numbers, times = map(list, zip(*frames, strict=True))
    if None in times or times != sorted(times):  # avi counts frames in the order of decoding
        times = [number / FPS for number in range(len(numbers))]
    return numbers, times


def check(data: bytes, cut: str) -> str:
    """ "right", "refused: why" or "wrong: why"."""
    try:
        numbers, times = shown(data)
    except (av.FFmpegError, IndexError, ValueError):
        numbers, times = [], []
    if not numbers:
        try:
            return f"wrong: read {tuple(read_video(data, 9, 96, 160).shape)}, but FFmpeg shows nothing"
        except VideoError as error:
            return f"refused by FFmpeg too: {error}"
    if cut != "trimmed" and numbers != list(range(NUM_FRAMES)):
        return f"wrong: FFmpeg shows {numbers}"
    try:
        read = [number_of(frame.permute(1, 2, 0).numpy()) for frame in read_video(data, 9, 96, 160)]
        size = probe_video(data)
    except VideoError as error:
        return f"refused: {error}"
    instants = [times[0] + (times[-1] - times[0]) * i / 8 for i in range(9)]
    right = [min(range(len(times)), key=lambda n: abs(times[n] - instant)) for instant in instants]
    near = all(got in numbers[max(0, n - 1) : n + 2] for got, n in zip(read, right, strict=True))
    expected = [numbers[n] for n in right]
    return "right" if near and size[:2] == (96, 160) else f"wrong: read {read} of size {size}, expected {expected}"


def cells(codec: str, containers: Iterable[str]) -> Iterator[tuple[str, str, str, str]]:
    """(container, group of pictures, cut, outcome) of what FFmpeg can write."""
    for gop in CODECS[codec][2]:
        clip, stamps = encode(codec, gop)
        for container in containers:
            for cut in ("whole", "trimmed", "offset"):
                try:
                    data = remux(clip, stamps, container, cut)
                except (av.FFmpegError, ValueError):
                    yield container, gop, cut, "not written"
                    continue
                yield container, gop, cut, check(data, cut)
