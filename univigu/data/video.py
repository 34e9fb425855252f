"""Video files in and out: decord reads (only the frames needed), PyAV writes H.264.

decord must never decode in a process that later forks workers (its threads do not survive the fork), so
nothing here is called at import time or from ``prepare_data``'s parent before workers start.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.dlpack import from_dlpack

MAX_PIXELS = 8192 * 4320
"""Pixels a frame may have: 8K.  A few damaged or hostile files of larger frames would take all memory."""
CHUNK_BYTES = 1 << 26
"""Decoded frames that are held at full size at once, at most (but always one)."""


class VideoError(ValueError):
    """A file that is not a readable video; the message names the file and the reason."""


def even_indices(num_available: int, num_frames: int) -> list[int]:
    """``num_frames`` frame numbers spread evenly over a clip, first and last included; short clips repeat frames."""
    if num_frames == 1:
        return [0]
    return [round(i * (num_available - 1) / (num_frames - 1)) for i in range(num_frames)]


def read_video(
    source: str | PathLike[str] | bytes, num_frames: int, height: int, width: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Read a clip of any size, length and frame rate into the model's shape.

    Frames are chosen evenly over the whole clip, resized so that the target is covered, and centre-cropped.

    Args:
        source: path of a video file, or its bytes.
        num_frames: frames wanted, at least 1 (Wan's VAE wants 4k+1).
        height, width: target size in pixels.
        out: where the frames go, uint8 [F, H, W, C]; None makes room.

    Returns:
        uint8 frames [F, C, H, W], a view of what lies in memory as [F, H, W, C], as decoders write it.

    Raises:
        VideoError: the source is missing, empty, or not a video with at least one frame.
    """
    if out is None:
        out = make_room((num_frames, height, width, 3))
    frames, done = out.permute(0, 3, 1, 2), 0
    for chunk in _decode(source, num_frames):
        frames[done : done + len(chunk)] = resize_and_crop(chunk.permute(0, 3, 1, 2), height, width)
        done += len(chunk)
    return frames


def make_room(shape: tuple[int, ...]) -> torch.Tensor:
    """Uninitialised uint8 memory for frames; numpy's comes in huge pages, which cost a third of the time to touch."""
    return torch.from_numpy(np.empty(shape, np.uint8))


def _decode(source: str | PathLike[str] | bytes, num_frames: int) -> Iterator[torch.Tensor]:
    """The frames [f, h, w, C] in turn, as few at a time as their size demands."""
    import av
    import decord  # here, not above: importing it loads ffmpeg, which `lightning --help` need not wait for

    name = "<bytes>" if isinstance(source, bytes) else str(source)
    handle: Any = io.BytesIO(source) if isinstance(source, bytes) else name
    if not isinstance(source, bytes):
        with _named(name), open(name, "rb") as file:
            if not file.read(1):
                raise VideoError(f"{name}: the file is empty")
    elif not source:
        raise VideoError(f"{name}: no bytes")
    with _named(name):
        with av.open(handle) as container:  # what decord cannot open it never frees: a tenth of a MiB each time
            if not container.streams.video:
                raise VideoError(f"{name}: holds no video")
            header = container.streams.video[0].codec_context
            _check_size(header.height, header.width, name)
        if isinstance(source, bytes):
            handle.seek(0)
        reader = decord.VideoReader(handle, num_threads=1)
        if len(reader) == 0:
            raise VideoError(f"{name}: holds no video frame")
        indices = even_indices(len(reader), num_frames)
        try:
            first = from_dlpack(reader.get_batch(indices[:1]).to_dlpack())  # its size is known only now
        except decord.DECORDError as error:
            if "size must exactly match" not in str(error):
                raise
            # Its scaler pads the rows of narrow frames (2, 4, 6, 8, 12, 16, 24, 48 and 72 pixels wide), and then it
            # cannot copy them.
            yield from _decode_narrow(source, indices, name)
            return
        _check_size(first.shape[1], first.shape[2], name)  # a header may be wrong
        yield first
        step = max(1, CHUNK_BYTES // first.nbytes)
        for start in range(1, len(indices), step):
            yield from_dlpack(reader.get_batch(indices[start : start + step]).to_dlpack())


def _check_size(height: int, width: int, name: str) -> None:
    if height * width > MAX_PIXELS:
        raise VideoError(f"{name}: frames of {width}x{height} pixels, over {MAX_PIXELS}")


def _decode_narrow(source: str | PathLike[str] | bytes, indices: list[int], name: str) -> Iterator[torch.Tensor]:
    """The frames [1, h, w, C] with these (ascending) numbers, by PyAV."""
    import av

    with av.open(io.BytesIO(source) if isinstance(source, bytes) else name, "r") as container:
        container.streams.video[0].thread_type = "NONE"  # as few threads as decord
        wanted = Counter(indices)
        for number, frame in enumerate(container.decode(video=0)):
            _check_size(frame.height, frame.width, name)
            image = torch.from_numpy(frame.to_ndarray(format="rgb24"))[None]
            yield from [image] * wanted.pop(number, 0)
            if not wanted:
                return
        raise VideoError(f"{name}: holds fewer frames than its header says, no frame {min(wanted)}")


def probe_video(source: Any) -> tuple[int, int, int]:
    """(height, width, number of frames) of a video as its headers say; nothing is decoded.

    Args:
        source: path of a file, or a file object that can seek.

    Raises:
        VideoError: there is no video with at least one frame.
    """
    import av

    name = str(source) if isinstance(source, str | PathLike) else "<bytes>"
    with _named(name), av.open(source) as container:
        if not container.streams.video:
            raise VideoError(f"{name}: holds no video")
        stream = container.streams.video[0]
        height, width = stream.codec_context.height, stream.codec_context.width
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)  # webm does not say
        if min(height, width, frames) < 1:
            raise VideoError(f"{name}: {frames} frames of {width}x{height} pixels")
        return height, width, frames


class _named:
    """Turns the many exceptions of a decoder into one VideoError that names the file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, VideoError) or not isinstance(error, Exception):
            return
        if isinstance(error, OSError):
            raise VideoError(f"{self.name}: {error.strerror or error}") from error
        # decord's messages carry a C++ stack trace after the first line
        text = getattr(error, "strerror", None) or str(error)  # PyAV's have a number and <none> around it
        reason = (text.strip().splitlines() or [type(error).__name__])[0]
        raise VideoError(f"{self.name}: not a readable video ({reason[-160:]})") from error


def resize_and_crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scale uint8 frames [F, C, h, w] so that they cover [height, width], then crop the centre."""
    source_height, source_width = frames.shape[-2:]
    if (source_height, source_width) == (height, width):
        return frames
    scale = max(height / source_height, width / source_width)
    size = (max(height, round(source_height * scale)), max(width, round(source_width * scale)))
    # In bytes, and as they lie in memory: twenty times quicker than in floats, and within one level of them.
    resized = F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[..., top : top + height, left : left + width]


def to_model_range(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [..., F, C, H, W] -> float32 [..., C, F, H, W] in [-1, 1], as Wan's VAE wants it."""
    return frames.transpose(-4, -3).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1.0


def to_frames(video: torch.Tensor) -> torch.Tensor:
    """float [..., C, F, H, W] in [-1, 1] -> uint8 [..., F, C, H, W], the inverse of :func:`to_model_range`."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).transpose(-4, -3)


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames as a pipeline gives them, float in [0, 1], of any shape -> uint8."""
    return (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)


def encode_mp4(frames: torch.Tensor, fps: int = 8, crf: int = 12) -> bytes:
    """H.264 mp4 bytes of uint8 frames [F, C, H, W] (even H and W); deterministic for given frames and version.

    ``crf`` is x264's constant rate factor: 0 is lossless, 23 its usual default.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = frames.shape[3], frames.shape[2], "yuv420p"  # type: ignore[attr-defined]
        stream.thread_count = 1  # type: ignore[attr-defined]
        # x264's assembly is not deterministic at this preset: the same frames gave different bytes
        stream.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "no-asm=1"}
        for image in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))  # type: ignore[attr-defined]
        container.mux(stream.encode())  # type: ignore[attr-defined]
    return buffer.getvalue()
