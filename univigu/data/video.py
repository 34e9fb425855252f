"""The only module that reads and writes video files: ``read_video``, ``probe_video`` and ``encode_mp4``.

decord decodes (only the frames needed), PyAV reads headers and writes H.264.  decord's threads do not survive a fork,
so a process that forks workers later must not decode.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.dlpack import from_dlpack

MAX_PIXELS = 8192 * 4320
"""Largest frame that is decoded: 8K.  A few damaged or hostile files with larger frames would take all memory."""
CHUNK_BYTES = 1 << 26
"""Most bytes of decoded frames that are held at full size at once (at least one frame)."""


class VideoError(ValueError):
    """A file that is not a readable video; the message names the file and the reason."""


def even_indices(num_available: int, num_frames: int) -> list[int]:
    """``num_frames`` frame numbers spread evenly over a clip, first and last included; short clips repeat frames."""
    if num_frames == 1:
        return [0]
    return [round(i * (num_available - 1) / (num_frames - 1)) for i in range(num_frames)]


def read_video(source: str | PathLike[str] | bytes, num_frames: int, height: int, width: int) -> torch.Tensor:
    """Read a clip of any size, length and frame rate into the model's shape.

    Frames are chosen evenly over the whole clip, resized so that the target is covered, and centre-cropped.

    Args:
        source: path of a video file, or its bytes.
        num_frames: frames wanted, at least 1 (Wan's VAE wants 4k+1).
        height, width: target size in pixels.

    Returns:
        uint8 frames [F, C, H, W], a view of [F, H, W, C] in memory.

    Raises:
        VideoError: the source is missing, empty, or not a video with at least one frame.
    """
    # numpy allocates huge pages, which take a third of the time to touch
    frames, done = torch.from_numpy(np.empty((num_frames, height, width, 3), np.uint8)).permute(0, 3, 1, 2), 0
    for chunk in _decode(source, num_frames):
        frames[done : done + len(chunk)] = resize_and_crop(chunk.permute(0, 3, 1, 2), height, width)
        done += len(chunk)
    return frames


def _decode(source: str | PathLike[str] | bytes, num_frames: int) -> Iterator[torch.Tensor]:
    """Chunks [f, h, w, C] of the evenly spread frames, of at most CHUNK_BYTES."""
    import av
    import decord  # not at the top: it loads ffmpeg, which `lightning --help` does not need

    name = "<bytes>" if isinstance(source, bytes) else str(source)
    handle: Any = io.BytesIO(source) if isinstance(source, bytes) else name
    if not isinstance(source, bytes):
        with _named(name), open(name, "rb") as file:
            if not file.read(1):
                raise VideoError(f"{name}: the file is empty")
    elif not source:
        raise VideoError(f"{name}: no bytes")
    with _named(name):
        with av.open(handle) as container:  # decord leaks 0.1 MiB for each file that it cannot open
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
            first = from_dlpack(reader.get_batch(indices[:1]).to_dlpack())
        except decord.DECORDError as error:
            if "size must exactly match" not in str(error):
                raise
            # decord cannot copy frames whose rows its scaler pads: widths 2, 4, 6, 8, 12, 16, 24, 48 and 72
            yield from _decode_narrow(source, indices, name)
            return
        _check_size(first.shape[1], first.shape[2], name)  # the header may be wrong
        yield first
        step = max(1, CHUNK_BYTES // first.nbytes)
        for start in range(1, len(indices), step):
            yield from_dlpack(reader.get_batch(indices[start : start + step]).to_dlpack())


def _check_size(height: int, width: int, name: str) -> None:
    if height * width > MAX_PIXELS:
        raise VideoError(f"{name}: frames of {width}x{height} pixels, over {MAX_PIXELS}")


def _decode_narrow(source: str | PathLike[str] | bytes, indices: list[int], name: str) -> Iterator[torch.Tensor]:
    """The frames [1, h, w, C] of these ascending numbers, decoded by PyAV."""
    import av

    with av.open(io.BytesIO(source) if isinstance(source, bytes) else name, "r") as container:
        container.streams.video[0].thread_type = "NONE"  # one thread, like decord
        wanted = Counter(indices)
        for number, frame in enumerate(container.decode(video=0)):
            _check_size(frame.height, frame.width, name)
            image = torch.from_numpy(frame.to_ndarray(format="rgb24"))[None]
            yield from [image] * wanted.pop(number, 0)
            if not wanted:
                return
        raise VideoError(f"{name}: holds fewer frames than its header says, no frame {min(wanted)}")


def probe_video(source: Any) -> tuple[int, int, int]:
    """(height, width, number of frames) of a video by its headers; nothing is decoded.

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
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)  # webm has no count
        if min(height, width, frames) < 1:
            raise VideoError(f"{name}: {frames} frames of {width}x{height} pixels")
        return height, width, frames


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn the many exceptions of a decoder into one VideoError that names the file."""
    try:
        yield
    except VideoError:
        raise
    except OSError as error:
        raise VideoError(f"{name}: {error.strerror or error}") from error
    except Exception as error:
        # decord's messages carry a C++ stack trace after the first line; PyAV's strerror is the readable part
        text = getattr(error, "strerror", None) or str(error)
        reason = (text.strip().splitlines() or [type(error).__name__])[0]
        raise VideoError(f"{name}: not a readable video ({reason[-160:]})") from error


def resize_and_crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scale uint8 frames [F, C, h, w] so that they cover [height, width], then crop the centre."""
    source_height, source_width = frames.shape[-2:]
    if (source_height, source_width) == (height, width):
        return frames
    scale = max(height / source_height, width / source_width)
    size = (max(height, round(source_height * scale)), max(width, round(source_width * scale)))
    # uint8 in channels-last layout: twenty times faster than float, and within one level of it
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
