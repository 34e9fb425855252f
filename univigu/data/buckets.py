"""Buckets: the few sizes that videos are resized and cropped to, so that the clips of a batch have one size."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from univigu.data.options import check_least
from univigu.data.sample import LATENTS_SUFFIX, DataError, SampleRef
from univigu.data.video import VideoError, probe_video


@dataclass(frozen=True)
class Bucket:
    """A size that videos are brought to."""

    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    num_frames: int
    """Frames of a clip, 4k+1 for Wan's VAE."""

    def __post_init__(self) -> None:
        check_least(self, "data.buckets: ", height=2, width=2, num_frames=1)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.num_frames}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """The inverse of ``str``: HEIGHTxWIDTHxFRAMES; raises ValueError."""
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise ValueError(f"bucket {text!r}: expected HEIGHTxWIDTHxFRAMES, such as 480x832x81")
        return cls(*map(int, parts))


def best_bucket(buckets: Sequence[Bucket], height: int, width: int, num_frames: int) -> int:
    """Number of the bucket that keeps most of a clip of that size; of equals the nearest in area, then the first.

    Kept is the share of the area that the crop leaves times that of the frames; repeating frames counts the same.
    """
    keys = []
    for bucket in buckets:
        aspect = abs(math.log(width / height) - math.log(bucket.width / bucket.height))
        kept = math.exp(-aspect - abs(math.log(num_frames / bucket.num_frames)))
        area = abs(math.log(height * width) - math.log(bucket.height * bucket.width))
        keys.append((round(-kept, 6), round(area, 6)))
    return keys.index(min(keys))


@dataclass(frozen=True)
class Grid:
    """Compression of a foundation's VAE and patches of its transformer, which decide the video sizes it takes."""

    temporal: int
    """Frames a latent frame; the first latent frame stands for one."""
    spatial: int
    """Pixels a latent, in height and width."""
    patch: tuple[int, int, int]
    """Latents a token: frames, height, width."""

    @classmethod
    def of(cls, foundation: str | Path) -> Grid:
        """The grid of a WanPipeline folder, or DataError; the patches are Wan's if it has no transformer config."""
        path = Path(foundation) / "transformer" / "config.json"
        try:
            config = json.loads(path.read_text()) if path.exists() else {}
            frames, down, across = map(int, config.get("patch_size", (1, 2, 2)))
            path = Path(foundation) / "vae" / "config.json"
            vae = json.loads(path.read_text())
            scales = int(vae.get("scale_factor_temporal", 4)), int(vae.get("scale_factor_spatial", 8))
            return cls(*scales, (frames, down, across))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"foundation={str(foundation)!r}: no sizes in {path} ({error})") from error

    def latents_shape(self, bucket: Bucket, where: str = "") -> tuple[int, int, int]:
        """(T, H, W) of a size's latents; a DataError (``where``, then a field) if they are no whole tokens."""
        step = self.temporal * self.patch[0]
        first = step - self.temporal + 1
        if bucket.num_frames % step != first % step or bucket.num_frames < first:
            expected = f"expected {step}k+{first} for this foundation's VAE and transformer"
            raise DataError(f"{where}num_frames={bucket.num_frames}: {expected}")
        for side, patch in zip(("height", "width"), self.patch[1:], strict=True):
            if getattr(bucket, side) % (self.spatial * patch):
                expected = f"expected a multiple of {self.spatial * patch} for this foundation's VAE and transformer"
                raise DataError(f"{where}{side}={getattr(bucket, side)}: {expected}")
        return (bucket.num_frames - 1) // self.temporal + 1, bucket.height // self.spatial, bucket.width // self.spatial


def choose_bucket(ref: SampleRef, buckets: Sequence[Bucket], shapes: Sequence[tuple[int, int, int]] = ()) -> int:
    """Number of a sample's bucket, by the header of its video or latents; with a single bucket none is read.

    ``shapes`` are the (T, H, W) of each bucket's latents.  What cannot be read or fits no bucket is a SampleError.
    """
    suffix = ref.media
    if len(buckets) == 1:
        return 0
    if suffix == LATENTS_SUFFIX:
        # a safetensors file: 8 bytes of length, then JSON
        header = ref.read(suffix, 8 + int.from_bytes(ref.read(suffix, 8), "little"))[8:]
        try:
            shape = tuple(json.loads(header)["latents"]["shape"][1:])
        except (ValueError, KeyError, TypeError) as error:
            raise ref.error("corrupt_latents", "latents", repr(error)) from error
        if shape not in shapes:
            value = f"[T, H, W] is {list(shape)}, the buckets' are {list(shapes)}"
            raise ref.error("wrong_shape", "latents", value)
        return shapes.index(shape)
    member = ref.members[suffix]
    assert not isinstance(member, bytes)
    try:
        return best_bucket(buckets, *probe_video(member[0], member[1:]))
    except VideoError as error:
        raise ref.error("unreadable_video", "video", str(error)) from error
