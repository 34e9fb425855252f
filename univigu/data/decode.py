"""Decodes videos and images in a process of its own, since a damaged file can crash or hang a decoder.

``univigu.data.video`` runs this file as a script; it does not import torch, to start quickly.
"""

from __future__ import annotations

import io
import math
import resource
import signal
import struct
import sys
import tarfile
from collections import namedtuple
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.frame import PictureType
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

MAX_PIXELS = 8192 * 4320
"""Largest frame that is decoded: 8K."""
MAX_MEMORY = 8 << 30
"""Address space of the process in bytes."""
MAX_KEPT = 2**24
"""Largest file in bytes whose packets are all kept in memory; of others only this:"""
_Packet = namedtuple("_Packet", "pts is_keyframe is_discard")
OPTIONS = {"threads": "1", "protocol_whitelist": "none"}
"""Of FFmpeg; the second keeps playlists from opening other files and addresses."""
METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
"""PyAV 19 has no strict decoding of metadata, and no option for it."""
PILLOW_FORMATS = ("jpeg_pipe", "webp_pipe")
"""Images that Pillow reads: FFmpeg has no animated WebP, and PyAV does not give mirrored EXIF orientations."""
INDEXED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Containers in which a packet is a frame and key frames are marked reliably."""


class DecodeError(ValueError):
    """Why a file is not decoded."""


def is_hd(height: int, width: int) -> bool:
    """Whether players take BT.709, and not BT.601, for the colour matrix that a file does not name."""
    return height > 576 or width >= 1280


def nearest(times: np.ndarray, num_frames: int) -> np.ndarray:
    """Numbers of the frames nearest to ``num_frames`` instants spread evenly from the first frame to the last.

    ``times`` are presentation times in ascending order, in any unit; a single instant is at the first frame.
    """
    elapsed = times - times[0]
    instants = np.arange(num_frames) * elapsed[-1] / max(num_frames - 1, 1)
    return np.rint(np.interp(instants, elapsed, np.arange(len(elapsed)))).astype(int)


def read(file: Any, num_frames: int, height: int, width: int) -> np.ndarray:
    """Frames as displayed, scaled to cover the size and cropped at the centre: uint8 [F, H, W, 3]."""
    small = file.seek(0, io.SEEK_END) <= MAX_KEPT
    with _open(file) as (kind, stream):
        fill = _Filler(np.empty((num_frames, height, width, 3), np.uint8), float(stream.sample_aspect_ratio or 1))
        packets: Iterable[Any] = () if kind in PILLOW_FORMATS else _demux(stream)
        packets = [
            packet if small else _Packet(packet.pts, packet.is_keyframe, packet.is_discard) for packet in packets
        ]
        # Opening a small file again would take longer than decoding it.
        done = small and _read_by_packets(kind, stream, packets, packets, fill)
    if not small:
        with _open(file) as (kind, stream):
            done = _read_by_packets(kind, stream, packets, _demux(stream), fill)
    if not done:
        fill.missing = num_frames
        _read_by_frames(file, sum(not packet.is_discard for packet in packets), fill)
    return fill.frames


def probe(file: Any) -> tuple[int, int, int]:
    """(height, width, number of frames) as displayed; one frame is decoded."""
    with _open(file) as (kind, stream):
        aspect = float(stream.sample_aspect_ratio or 1)
        hidden = [entry.is_discard for entry in stream.index_entries]
        if kind in PILLOW_FORMATS:
            hidden = [False for _ in _pictures(file)]
        elif not stream.frames or len(hidden) != stream.frames:  # the index is not complete
            hidden = [packet.is_discard for packet in _demux(stream)]
    for frame in _decode(file):
        size = frame.height, max(1, round(frame.width * aspect))
        return *(size[::-1] if _orientation(frame)[0] else size), hidden.count(False)
    raise DecodeError("holds no video frame")


def _read_by_packets(kind: str, stream: Any, packets: list[Any], contents: Iterable[Any], fill: _Filler) -> bool:
    """Fill by the times of the packets; False if the decoder does not give these frames in this order."""
    times = [packet.pts for packet in packets if not packet.is_discard]
    if not times or None in times or len(set(times)) < len(times):
        return False
    all_keys = all(packet.is_keyframe for packet in packets)
    ordered = np.sort(times)
    wanted = ordered[nearest(ordered, len(fill.frames))]
    needed, last = None, None
    if kind in INDEXED_FORMATS and len(times) == len(packets):
        needed = _needed(packets, set(wanted.tolist()))
    for frame in _decode_packets(stream, contents, needed):
        if frame.pts is None or (last is not None and frame.pts <= last):
            return False
        if all_keys and frame.pict_type != PictureType.I:  # the file marks every frame as a key frame, but not all are
            return False
        last = frame.pts
        if fill(frame, wanted == last):
            return True
    return False


def _needed(packets: list[Any], wanted: set[int]) -> np.ndarray:
    """Which packets to decode for the frames at these times: each from the key frame before it."""
    needed, keys = np.zeros(len(packets), bool), []
    for number, packet in enumerate(packets):
        if packet.is_keyframe:
            keys.append(number)
        if packet.pts in wanted:
            # A frame that follows a key frame but is displayed before it needs the group before it.
            start = next((key for key in reversed(keys) if packets[key].pts <= packet.pts), 0)
            needed[start : number + 1] = True
    return needed


def _read_by_frames(file: Any, expected: int, fill: _Filler) -> None:
    """Fill by the times that the decoder gives; decodes twice, since the last time is known at the end."""
    pts = [frame.pts for frame in _decode(file)]
    if not pts or 2 * len(pts) < expected:
        raise DecodeError(f"only {len(pts)} of {expected} frames can be decoded" if pts else "holds no video frame")
    times = np.arange(len(pts)) if None in pts else np.array(pts)
    if (np.diff(times) > 0).all():
        chosen = nearest(times, len(fill.frames))
    else:
        # avi and asf give times in the order of decoding, a few frames off, but frames come in the order of
        # presentation: choose by time among the frames next to the choice by order.
        instants = np.linspace(times[0], times[-1], len(fill.frames))
        by_time = [len(pts) - 1 - np.abs(times[::-1] - instant).argmin() for instant in instants]
        order = np.linspace(0, len(pts) - 1, len(fill.frames))
        chosen = np.clip(by_time, np.floor(order + 0.5) - 1, np.ceil(order - 0.5) + 1)
    for number, frame in enumerate(_decode(file)):
        if fill(frame, chosen == number):
            return
    raise DecodeError("the decoder gives other frames each time")


@contextmanager
def _open(file: Any) -> Iterator[tuple[str, Any]]:
    """FFmpeg's name of the container's format, and its main video stream."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if not size:
        raise DecodeError("the file is empty")
    with av.open(file, options=OPTIONS, **METADATA) as container:
        stream: Any = container.streams.best("video")
        if stream is None or stream.disposition & stream.disposition.attached_pic:
            raise DecodeError("holds no video")
        if stream.codec_context is None:
            raise DecodeError("FFmpeg knows no decoder for its video")
        _check_size(stream.height, stream.width)
        if stream.frames > size or any(entry.pos + entry.size > size for entry in stream.index_entries):
            raise DecodeError(f"its header describes more than its {size} bytes")
        stream.codec_context.thread_count, stream.thread_type = 1, "NONE"
        yield container.format.name, stream


def _demux(stream: Any) -> Iterator[Any]:
    return (packet for packet in stream.container.demux(stream) if packet.size)


def _decode(file: Any) -> Iterator[Any]:
    """Frames in the order of presentation."""
    with _open(file) as (kind, stream):
        yield from _pictures(file) if kind in PILLOW_FORMATS else _decode_packets(stream, _demux(stream), None)


def _decode_packets(stream: Any, packets: Iterable[Any], needed: np.ndarray | None) -> Iterator[Any]:
    """Frames of the needed packets, None for all; those that cannot be decoded are skipped, as players do."""
    previous = -1
    for number, packet in enumerate(packets):
        if needed is None or needed[number]:
            if number > previous + 1:
                yield from _frames(stream, None)
                stream.codec_context.flush_buffers()
            previous = number
            yield from _frames(stream, packet)
    yield from _frames(stream, None)


def _frames(stream: Any, packet: Any) -> list[Any]:
    try:
        return stream.decode(packet)
    except av.FFmpegError:
        return []


def _pictures(file: Any) -> Iterator[Any]:
    """The pictures of a JPEG or WebP file as frames, with times in milliseconds."""
    from PIL import Image, ImageOps, ImageSequence

    file.seek(0)
    time = 0
    with Image.open(file, formats=("JPEG", "WEBP")) as image:
        _check_size(image.height, image.width)
        for picture in ImageSequence.Iterator(image) if image.format == "WEBP" else [image]:
            frame = av.VideoFrame.from_ndarray(np.asarray(ImageOps.exif_transpose(picture).convert("RGB")))
            frame.pts, time = time, time + (int(picture.info.get("duration", 0)) or 100)  # 0: as browsers show it
            yield frame


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"frames of {width}x{height} pixels, over {MAX_PIXELS}")


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Whether rows become columns, and then the order of rows and of columns is reversed."""
    a, b, c, d = 1.0, 0.0, 0.0, 1.0  # a stored pixel (x, y) is displayed at (ax + cy, bx + dy)
    try:
        if matrix := frame.side_data.get(SideData.DISPLAYMATRIX):
            a, b, _, c, d, *_ = struct.unpack("9i", bytes(matrix))
    except ValueError:  # the frame has side data of a kind that PyAV does not know
        angle = math.radians(frame.rotation)
        a, b, c, d = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    swap = abs(a) + abs(d) < abs(b) + abs(c)
    return swap, (b if swap else d) < 0, (c if swap else a) < 0


class _Filler:
    """Stores decoded frames in an array [F, H, W, 3], upright and in its size; ``aspect`` is that of their pixels."""

    def __init__(self, frames: np.ndarray, aspect: float) -> None:
        self.frames, self.aspect, self.missing, self.reformatter = frames, aspect, len(frames), VideoReformatter()

    def __call__(self, frame: Any, chosen: np.ndarray) -> bool:
        """Store a frame where ``chosen`` [F] is true; returns True once the array is full."""
        if not chosen.any():
            return False
        _check_size(frame.height, frame.width)  # it may be larger than the header says
        height, width = self.frames.shape[1:3]
        swap, flip_y, flip_x = _orientation(frame)
        least = (width, height) if swap else (height, width)
        shown = frame.height, frame.width * self.aspect
        scale = max(least[0] / shown[0], least[1] / shown[1])
        size = max(least[0], round(shown[0] * scale)), max(least[1], round(shown[1] * scale))
        _check_size(*size)
        hd, flags, matrix = is_hd(frame.height, frame.width), Interpolation.BILINEAR, None
        # FFmpeg's quick conversion, four times as fast, is for the others.
        if hd or size != (frame.height, frame.width):
            flags |= Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        if hd and frame.colorspace == 2 and not frame.format.is_rgb:  # the file names no matrix
            matrix = Colorspace.ITU709
        rgb = self.reformatter.reformat(
            frame, size[1], size[0], "rgb24", src_colorspace=matrix, interpolation=flags, threads=1
        ).to_ndarray()
        rgb = (rgb.swapaxes(0, 1) if swap else rgb)[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
        top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
        self.frames[chosen] = rgb[top : top + height, left : left + width]
        self.missing -= chosen.sum()
        return not self.missing


def _open_source(source: str | bytes, offset: int, size: int) -> Any:
    """A file, or its content; or the member of a tar at an offset, unless the size is -1."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if size < 0:
        return open(source, "rb")
    member = tarfile.TarInfo()
    member.offset_data, member.size = offset, size
    return tarfile.open(source, "r:").extractfile(member)


def _reason(error: Exception) -> str:
    if isinstance(error, DecodeError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"needs more than {MAX_MEMORY >> 30} GiB of memory"
    text = getattr(error, "strerror", None) or repr(error)
    if isinstance(error, OSError) and error.filename and not isinstance(error, av.FFmpegError):
        return text
    return f"not a readable video ({text.splitlines()[0][-160:]})"


def serve(connection: Connection) -> None:
    """Answer requests (seconds, path or bytes, section, size to read or None) until the other end closes."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")
    while True:
        try:
            seconds, source, section, size = connection.recv()
        except EOFError:
            return
        signal.alarm(seconds)  # ends the process, whatever it does
        reply: Any
        try:
            with _open_source(source, *section) as file:
                reply = read(file, *size) if size else probe(file)
        except Exception as error:
            reply = _reason(error)
        signal.alarm(0)
        connection.send(None if isinstance(reply, np.ndarray) else reply)
        if isinstance(reply, np.ndarray):
            with open(connection.fileno(), "wb", closefd=False) as pipe:
                pipe.write(reply.data)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
