"""Buckets: the few sizes that videos are resized and cropped to, so that the clips of a batch have one size."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from univigu.data.index import SampleRef
from univigu.data.sample import LATENTS_SUFFIX, DataError, SampleError, media_suffix
from univigu.data.video import VideoError, probe_video


@dataclass(frozen=True)
class Bucket:
    """A size that videos are brought to."""

    height: int
    width: int
    num_frames: int
    """4k+1 for Wan's VAE."""

    def __post_init__(self) -> None:
        for name, least in (("height", 2), ("width", 2), ("num_frames", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.buckets: {name}={getattr(self, name)}: expected at least {least}")

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.num_frames}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """The inverse of ``str``: HEIGHTxWIDTHxFRAMES; raises ValueError."""
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise ValueError(f"bucket {text!r}: expected HEIGHTxWIDTHxFRAMES, such as 480x832x81")
        return cls(*map(int, parts))

    def kept(self, height: int, width: int, num_frames: int) -> float:
        """Share of a clip's area that the crop keeps, times the share of its frames that are used.

        A clip that is shorter than the bucket repeats frames, which counts like frames lost from a longer one.
        """
        aspect = abs(math.log(width / height) - math.log(self.width / self.height))
        return math.exp(-aspect - abs(math.log(num_frames / self.num_frames)))


def best_bucket(buckets: Sequence[Bucket], height: int, width: int, num_frames: int) -> int:
    """Number of the bucket that keeps most of a clip of that size; of equals the nearest in area, then the first."""

    def badness(number: int) -> tuple[float, float]:
        bucket = buckets[number]
        area = abs(math.log(height * width) - math.log(bucket.height * bucket.width))
        return round(-bucket.kept(height, width, num_frames), 6), round(area, 6)

    return min(range(len(buckets)), key=badness)


def size_parameters(buckets: Sequence[Bucket]) -> dict[str, Any]:
    """The sizes as a manifest of latents records them."""
    return asdict(buckets[0]) if len(buckets) == 1 else {"buckets": [str(bucket) for bucket in buckets]}


def latents_shape(bucket: Bucket, temporal: int, spatial: int) -> tuple[int, int, int]:
    """(T, H, W) of a bucket's latents under a VAE of that compression."""
    return (bucket.num_frames - 1) // temporal + 1, bucket.height // spatial, bucket.width // spatial


@dataclass(frozen=True)
class Grid:
    """Compression of a foundation's VAE and patches of its transformer, which decide the video sizes it takes."""

    temporal: int
    """Frames a latent frame; the first latent frame stands for one."""
    spatial: int
    """Pixels a latent, in height and width."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latents a token: frames, height, width."""

    @classmethod
    def of(cls, foundation: str | Path) -> Grid:
        """The grid of a WanPipeline folder; the patches are Wan's if it has no transformer config.

        Raises:
            DataError: a config cannot be read or lacks these numbers.
        """
        has_transformer = (Path(foundation) / "transformer" / "config.json").exists()
        vae, transformer = _config(foundation, "vae"), _config(foundation, "transformer") if has_transformer else {}
        try:
            scales = int(vae.get("scale_factor_temporal", 4)), int(vae.get("scale_factor_spatial", 8))
            frames, down, across = map(int, transformer.get("patch_size", cls.patch))
        except (TypeError, ValueError) as error:
            raise DataError(f"foundation={str(foundation)!r}: no sizes in its config.json files ({error})") from error
        return cls(*scales, (frames, down, across))

    def check(self, bucket: Bucket, name: Callable[[str], str] = str) -> None:
        """Raise a DataError for a size that is no whole number of tokens; ``name`` gives a field its user's name."""
        step = self.temporal * self.patch[0]
        first = step - self.temporal + 1
        if bucket.num_frames % step != first % step or bucket.num_frames < first:
            expected = f"expected {step}k+{first} for this foundation's VAE and transformer"
            raise DataError(f"{name('num_frames')}={bucket.num_frames}: {expected}")
        for side, patch in zip(("height", "width"), self.patch[1:], strict=True):
            if getattr(bucket, side) % (self.spatial * patch):
                expected = f"expected a multiple of {self.spatial * patch}: {self.spatial} pixels a latent of this "
                expected += f"foundation's VAE, {patch} latents a token of its transformer"
                raise DataError(f"{name(side)}={getattr(bucket, side)}: {expected}")

    def latents_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """(T, H, W) of a bucket's latents."""
        return latents_shape(bucket, self.temporal, self.spatial)


def _config(foundation: str | Path, component: str) -> dict[str, Any]:
    try:
        config = json.loads((Path(foundation) / component / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"foundation={str(foundation)!r}: no readable {component}/config.json ({error})") from error
    if not isinstance(config, dict):
        raise DataError(f"foundation={str(foundation)!r}: {component}/config.json: expected an object, got {config!r}")
    return config


class BucketChooser:
    """Chooses a sample's bucket by the headers of its video or latents; nothing is decoded.

    Args:
        buckets: to choose among; with a single one no header is read.
        shapes: (T, H, W) of each bucket's latents, if samples may be latents.
    """

    def __init__(self, buckets: Sequence[Bucket], shapes: Sequence[tuple[int, int, int]] = ()) -> None:
        self.buckets, self.shapes = buckets, list(shapes)

    def __call__(self, ref: SampleRef) -> int:
        """The bucket's number.

        Raises:
            SampleError: unreadable_video, corrupt_latents, or wrong_shape if latents fit no bucket.
        """
        if len(self.buckets) == 1:
            return 0
        suffix = media_suffix(ref.members, ref.shard, ref.key)
        with ref.open(suffix) as file:
            _, offset, size = ref.members[suffix]
            section = _FileSection(file, offset, size)
            if suffix == LATENTS_SUFFIX:
                return self._of_latents(ref, section, size)
            try:
                return best_bucket(self.buckets, *probe_video(section))
            except VideoError as error:
                raise SampleError("unreadable_video", ref.shard, ref.key, "video", str(error)) from error

    def _of_latents(self, ref: SampleRef, section: _FileSection, size: int) -> int:
        """By the header of the safetensors file: 8 bytes of length, then JSON."""
        try:
            header = json.loads(section.read(min(int.from_bytes(section.read(8), "little"), size)))
            shape = tuple(header["latents"]["shape"][1:])
        except (ValueError, KeyError, TypeError) as error:
            raise SampleError("corrupt_latents", ref.shard, ref.key, "latents", repr(error)) from error
        if shape not in self.shapes:
            value = f"[T, H, W] is {list(shape)}, the buckets' are {self.shapes}"
            raise SampleError("wrong_shape", ref.shard, ref.key, "latents", value)
        return self.shapes.index(shape)


class _FileSection(io.RawIOBase):
    """A section of a file as a file of its own; a size of -1 is the rest of the file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        if size < 0:
            size = os.fstat(file.fileno()).st_size - offset
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
