"""Video files in and out; ``univigu.data.decode`` decodes them in a process of its own."""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

DECODE_SECONDS = 120
"""Time limit of reading one file."""

Source = str | PathLike[str] | bytes


class VideoError(ValueError):
    """A file that is not a readable video."""


def even_indices(num_available: int, num_frames: int) -> list[int]:
    """``num_frames`` frame numbers spread evenly over a clip, first and last included; short clips repeat frames."""
    return np.rint(np.arange(num_frames) * (num_available - 1) / max(num_frames - 1, 1)).astype(int).tolist()


def read_video(source: Source, num_frames: int, height: int, width: int) -> torch.Tensor:
    """Read a video or an image (a path or its bytes) into uint8 [F, C, H, W], a view of [F, H, W, C] in memory.

    Frames are as a player shows them: upright, in square pixels, without those that an edit list hides.  The chosen
    ones are nearest in time to instants spread evenly from the first frame to the last; short clips repeat frames.
    They are scaled to cover the size and cropped at the centre.  What is missing, no video, or takes too long is a
    VideoError.
    """
    return torch.from_numpy(_decoder.ask(source, (0, -1), (num_frames, height, width))).permute(0, 3, 1, 2)


def probe_video(source: Source, section: tuple[int, int] = (0, -1)) -> tuple[int, int, int]:
    """(height, width, frames) of a video as it is shown, or VideoError; ``section`` is its (offset, size) in a tar."""
    return _decoder.ask(source, section, None)


class _Decoder:
    """Runs ``decode.py`` and restarts it when it died.  It ends when this end of the pipe closes, however it does."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start over in a forked process: the running decoder, its pipe and a lock that is held are the parent's."""
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Any = None

    def ask(self, source: Source, section: tuple[int, int], size: tuple[int, int, int] | None) -> Any:
        """What ``decode.read`` returns for (frames, height, width); for None, what ``decode.probe`` returns."""
        name = "<bytes>" if isinstance(source, bytes) else os.fspath(source)
        file = source if isinstance(source, bytes) else os.path.abspath(name)
        with self.lock:
            process = self.process
            if process is None or process.poll() is not None:
                process = self._start()
            try:
                self.connection.send((DECODE_SECONDS, file, section, size))
                reply = self.connection.recv()
                if reply is None and size is not None:
                    reply = np.empty((*size, 3), np.uint8)  # in huge pages, which take a third of the time to touch
                    with open(self.connection.fileno(), "rb", closefd=False) as pipe:
                        if pipe.readinto(reply.data) < reply.nbytes:
                            raise EOFError
            except (EOFError, ConnectionError):
                code = process.wait()
                end = f"took longer than {DECODE_SECONDS} s" if code == -signal.SIGALRM else f"died, exit code {code}"
                raise VideoError(f"{name}: not a readable video (the decoder {end})") from None
            except BaseException:  # the rest of the answer must not be taken for the next one
                self.stop()
                raise
        if isinstance(reply, str):
            raise VideoError(f"{name}: {reply}")
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", Path(__file__).with_name("decode.py"), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for this process
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        try:
            self.connection.recv()
        except EOFError:
            raise RuntimeError(f"the video decoder does not start: exit code {self.process.wait()}") from None
        return self.process

    def stop(self) -> None:
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.wait()


_decoder = _Decoder()
os.register_at_fork(after_in_child=_decoder.forget)
atexit.register(_decoder.stop)


def to_model_range(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [..., F, C, H, W] -> float32 [..., C, F, H, W] in [-1, 1], as Wan's VAE wants it."""
    return frames.transpose(-4, -3).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1.0


def to_frames(video: torch.Tensor) -> torch.Tensor:
    """float [..., C, F, H, W] in [-1, 1] -> uint8 [..., F, C, H, W], the inverse of ``to_model_range``."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).transpose(-4, -3)


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames as a pipeline gives them, float in [0, 1], of any shape -> uint8."""
    return (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)


def encode_mp4(frames: torch.Tensor, fps: int = 8, crf: int = 12) -> bytes:
    """H.264 mp4 bytes of uint8 sRGB frames [F, C, H, W] (even H and W); deterministic for given frames and version.

    The file names its colours: BT.709 in limited range, with the matrix of BT.601 in standard definition.  ``crf`` is
    x264's constant rate factor: 0 is lossless, 23 its usual default.
    """
    import av  # quickly imported processes do not load it

    from univigu.data.decode import is_hd

    height, width = frames.shape[2:]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.color_primaries, context.color_trc, context.color_range = 1, 1, 1  # BT.709, BT.709, limited
        context.colorspace = 1 if is_hd(height, width) else 6  # BT.709, SMPTE 170M
        # x264's assembly is not deterministic at this preset: the same frames gave different bytes
        context.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "no-asm=1"}
        for image in frames.permute(0, 2, 3, 1).contiguous().numpy():
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.colorspace = context.colorspace  # of the frame that is encoded
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()
