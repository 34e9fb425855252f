"""Videos are read as players show them, damaged ones cost one error, and written ones name their colours."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageOps

from tests import video_matrix
from tests.conftest import REPO
from tests.damage import mutate, videos_to_mutate
from univigu.data import decode as decoding
from univigu.data import video
from univigu.data.decode import nearest
from univigu.data.index import scan_shard
from univigu.data.shards import write_shard
from univigu.data.video import VideoError, encode_mp4, even_indices, probe_video, read_video
from univigu.shapes import renderer, scenes

CASES = REPO.parent / "shared" / "cases"
RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
CORNERS = np.array([[RED, GREEN], [BLUE, BLACK]], np.uint8).repeat(24, 0).repeat(32, 1)
"""A picture of four colours [48, 64, 3]."""


def clip(height: int = 64, width: int = 64, num_frames: int = 9) -> torch.Tensor:
    return renderer.render(scenes.sample_scene(3), height, width, num_frames)


def write(
    pictures: list[np.ndarray],
    matrix: Colorspace = Colorspace.ITU601,
    full_range: bool = False,
    rotation: int = 0,
    flip: str = "",
    **settings: Any,
) -> bytes:
    """An mp4 file of RGB pictures; ``settings`` are attributes of the encoder."""
    buffer, reformatter = io.BytesIO(), VideoReformatter()
    with av.open(buffer, "w", format="mp4") as target:
        stream: Any = target.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        if rotation or flip:
            stream.set_display_rotation(rotation, **({flip: True} if flip else {}))
        for picture in pictures:
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(picture, format="rgb24"),
                format="yuv420p",
                dst_colorspace=matrix,
                dst_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
            )
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return buffer.getvalue()


def save(images: list[Any], format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    images[0].save(buffer, format, **({"save_all": True, "append_images": images[1:]} if images[1:] else {}), **options)
    return buffer.getvalue()


def shown(data: bytes) -> np.ndarray:
    """The first frame in the size that the headers say [h, w, 3]."""
    height, width, _ = probe_video(data)
    return read_video(data, 1, height, width)[0].permute(1, 2, 0).numpy().astype(int)


# --- which frames


@pytest.mark.parametrize(("available", "wanted"), [(9, 9), (9, 5), (10, 5), (9, 20), (1, 4), (300, 9), (8, 5), (7, 1)])
def test_at_a_constant_rate_the_nearest_frames_are_evenly_numbered(available: int, wanted: int) -> None:
    assert nearest(1000 + 512 * np.arange(available), wanted).tolist() == even_indices(available, wanted)


def test_the_nearest_frames_at_a_variable_rate() -> None:
    times = np.array([*range(0, 1000, 20), *range(1000, 11001, 1000)])  # 50 in the first second, 11 in ten
    assert times[nearest(times, 12)].tolist() == [0, *range(1000, 11001, 1000)]


SAMPLE = {
    "libx264": ("mp4", "matroska", "avi", "mpegts"),
    "libx265": ("mov",),
    "mpeg4": ("avi", "mp4"),
    "mpeg2video": ("mpeg", "asf"),
    "libvpx": ("webm",),
    "mjpeg": ("avi",),
}
WHOLE = os.environ.get("UNIVIGU_MATRIX") == "full"
TOTALS: Counter[str] = Counter()


@pytest.mark.parametrize("codec", video_matrix.CODECS if WHOLE else SAMPLE)
def test_frames_are_those_that_players_show(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """UNIVIGU_MATRIX=full tests every codec in every container: what is not read rightly FFmpeg refuses, too."""
    monkeypatch.setenv("SVT_LOG", "1")  # errors only
    containers = video_matrix.CONTAINERS if WHOLE else SAMPLE[codec]
    found = list(video_matrix.cells(codec, containers))
    assert len(found) == 3 * len(containers) * len(video_matrix.CODECS[codec][2])
    TOTALS.update(outcome.partition(":")[0] for *_, outcome in found)
    print(*(" ".join(cell) for cell in found if cell[-1].startswith("refused")), f"so far {dict(TOTALS)}", sep="\n")
    allowed = ("right", "refused by FFmpeg too", "not written") if WHOLE else ("right",)
    assert [cell for cell in found if not cell[-1].startswith(allowed)] == []


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_frames_that_are_wrongly_marked_as_key_frames(codec: str) -> None:
    """Without its list of key frames an mp4 file says that every frame is one."""
    data = video_matrix.remux(*video_matrix.encode(codec, video_matrix.CLOSED), "mp4", "whole")
    for content in (data, data.replace(b"stss", b"free")):
        frames = read_video(content, 7, 96, 160).permute(0, 2, 3, 1).numpy()
        assert [video_matrix.number_of(frame) for frame in frames] == even_indices(60, 7)


def test_of_key_frames_only_the_chosen_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video_matrix.remux(*video_matrix.encode("libx264", video_matrix.INTRA), "mp4", "whole")
    decoded: list[int] = []
    original = decoding._frames
    monkeypatch.setattr(decoding, "_frames", lambda *args: decoded.append(1) or original(*args))
    frames = decoding.read(io.BytesIO(data), 3, 96, 160)
    assert [video_matrix.number_of(frame) for frame in frames] == [0, 30, 59]
    assert len(decoded) < 10


@pytest.mark.parametrize("container", ["mp4", "avi", "mpegts"])
def test_packets_of_large_files_are_read_again(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = video_matrix.remux(*video_matrix.encode("libx264", video_matrix.B_FRAMES), container, "trimmed")
    kept = [decoding.read(io.BytesIO(data), number, 96, 160) for number in (3, 40)]
    monkeypatch.setattr(decoding, "MAX_KEPT", 0)
    assert all(np.array_equal(frames, decoding.read(io.BytesIO(data), len(frames), 96, 160)) for frames in kept)


def test_an_edit_list_hides_frames() -> None:
    data = video_matrix.remux(*video_matrix.encode("libx264", video_matrix.B_FRAMES), "mp4", "trimmed")
    frames = read_video(data, 4, 96, 160).permute(0, 2, 3, 1).numpy()
    assert [video_matrix.number_of(frame) for frame in frames] == [20, 29, 37, 46]  # stored from 0, trimmed from 20
    assert probe_video(data) == (96, 160, 27)  # the copy broke off before some B-frames


@pytest.mark.skipif(not CASES.is_dir(), reason="no example files beside this checkout")
def test_example_files() -> None:
    for name, case in json.loads((CASES / "video" / "cases.json").read_text()).items():
        frames = read_video(CASES / "video" / name, 9, 96, 160).permute(0, 2, 3, 1).numpy()
        numbers = [case["shown"].index(video_matrix.number_of(frame)) for frame in frames]
        right = [case["shown"].index(number) for number in case["nearest_in_time_of_9"]]
        assert np.abs(np.subtract(numbers, right)).max() <= 1, name
        assert probe_video(CASES / "video" / name) == (96, 160, len(case["shown"]))
    assert probe_video(CASES / "data" / "rotated_90.mp4")[:2] == (160, 96)


# --- images


def gray(level: int) -> Image.Image:
    return Image.new("RGB", (60, 40), (level,) * 3)


@pytest.mark.parametrize("format", ["gif", "webp", "png", "avif"])
def test_animated_images_are_clips(format: str) -> None:
    data = save([gray(level) for level in (10, 60, 110, 160, 210)], format, duration=[1000, 100, 100, 100, 100])
    assert probe_video(data) == (40, 60, 5)
    levels = read_video(data, 5, 40, 60).float().mean((1, 2, 3))
    torch.testing.assert_close(levels, torch.tensor([10.0, 10, 60, 60, 210]), atol=3, rtol=0)


@pytest.mark.parametrize("format", ["gif", "webp", "png", "jpeg", "bmp", "tiff"])
def test_still_images_are_clips_of_one_frame(format: str, tmp_path: Path) -> None:
    path = tmp_path / "a: 100%d [1080p]"
    path.write_bytes(save([Image.fromarray(CORNERS)], format))
    assert probe_video(path) == (48, 64, 1)
    frames = read_video(path, 3, 48, 64)
    assert all(torch.equal(frame, frames[0]) for frame in frames)
    difference = np.abs(shown(path.read_bytes()) - CORNERS)
    assert difference[8:16, 8:16].max() <= 3 and difference[-8:, -8:].max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(orientation: int) -> None:
    image = Image.fromarray(CORNERS)
    exif = image.getexif()
    exif[0x112] = orientation
    data = save([image], "jpeg", exif=exif, quality=95)
    assert np.array_equal(shown(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def test_images_of_other_modes() -> None:
    ramp = np.arange(2400).reshape(40, 60) * 27
    for image in (Image.fromarray(ramp.astype(np.uint16)), Image.fromarray((ramp >> 8).astype(np.uint8))):
        assert np.abs(shown(save([image], "png")) - (ramp / 257)[..., None]).max() <= 2
    for mode in ("RGBA", "P"):
        assert np.array_equal(shown(save([Image.fromarray(CORNERS).convert(mode)], "png")), CORNERS)


# --- how frames are displayed


@pytest.mark.parametrize("angle", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", ["", "hflip", "vflip"])
def test_videos_are_upright(angle: int, flip: str) -> None:
    data = write([CORNERS] * 3, rotation=angle, flip=flip)
    flipped = {"": CORNERS, "hflip": CORNERS[:, ::-1], "vflip": CORNERS[::-1]}[flip]
    expected = np.rot90(flipped, angle // 90 if not flip or angle % 180 == 0 else -angle // 90)
    found = shown(data)
    assert found.shape == expected.shape
    for y in (0.25, 0.75):
        for x in (0.25, 0.75):
            at = int(y * found.shape[0]), int(x * found.shape[1])
            assert np.abs(found[at] - expected[at]).max() < 40, (angle, flip, at)


@pytest.mark.parametrize(("aspect", "size"), [((1, 2), (48, 32)), ((2, 1), (48, 128)), ((4, 3), (48, 85))])
def test_pixels_that_are_not_square(aspect: tuple[int, int], size: tuple[int, int]) -> None:
    data = write([CORNERS], sample_aspect_ratio=Fraction(*aspect))
    assert probe_video(data) == (*size, 1)
    assert probe_video(write([CORNERS], sample_aspect_ratio=Fraction(*aspect), rotation=90)) == (*size[::-1], 1)
    wide = read_video(data, 1, 48, 96)[0]  # covered and cropped
    assert (wide[:, 10, 5] - torch.tensor(RED)).abs().max() < 40 and (wide[:, 10, 90] - torch.tensor(GREEN)).max() < 40


@pytest.mark.parametrize(("matrix", "name"), [(Colorspace.ITU709, 1), (Colorspace.ITU601, 6)])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_are_converted_as_the_file_says(matrix: Colorspace, name: int, full_range: bool) -> None:
    found = shown(write([CORNERS], matrix, full_range, colorspace=name, color_range=2 if full_range else 1))
    assert np.abs(found - CORNERS)[8:16, 8:16].max() <= 4 and np.abs(found - CORNERS)[-8:, :8].max() <= 4


@pytest.mark.parametrize(("lines", "matrix"), [(720, Colorspace.ITU709), (576, Colorspace.ITU601)])
def test_a_matrix_that_is_not_named_depends_on_the_size(lines: int, matrix: Colorspace) -> None:
    picture = CORNERS.repeat(lines // 48, 0).repeat(lines // 48, 1)
    assert np.abs(shown(write([picture], matrix)) - picture)[100:200, 100:200].max() <= 4


@pytest.mark.parametrize("width", [2, 4, 6, 8, 12, 16, 24, 48, 64, 66, 72])
def test_narrow_clips(width: int) -> None:
    levels = torch.arange(9)[:, None, None, None] * 20 + torch.arange(32)[:, None]  # each frame is brighter
    frames = levels.expand(9, 3, 32, width).to(torch.uint8)
    for wanted in (1, 5, 20):
        read = read_video(encode_mp4(frames, crf=0), wanted, 32, width)
        assert (read.float() - frames[even_indices(9, wanted)].float()).abs().max() <= 2


def test_sizes_are_covered_and_cropped() -> None:
    picture = np.zeros((48, 96, 3), np.uint8)
    picture[:, 24:72] = 255  # the centre that a square keeps
    assert read_video(write([picture]), 1, 96, 96)[0, :, :, 4:-4].min() > 240
    for data in (save([Image.new("L", (60000, 1))], "png"), save([Image.new("L", (6000, 6000))], "jpeg")):
        with pytest.raises(VideoError, match=r"frames of \d+x\d+ pixels, over"):
            read_video(data, 1, 512, 512)


def test_a_member_of_a_tar_is_probed(tmp_path: Path) -> None:
    data = encode_mp4(clip(34, 50, 7))
    write_shard(tmp_path / "tar", [("a", {"json": b"{}"}), ("b", {"mp4": data}), ("c", {"json": b"{}"})])
    _, ref, _ = scan_shard(tmp_path / "tar")[0]
    path, *section = ref.members["mp4"]
    assert probe_video(path, tuple(section)) == (34, 50, 7) == probe_video(data)


# --- damaged and hostile files


def patch(data: bytes, tag: bytes, offset: int, number: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(">I", changed, data.index(tag) + offset, number)
    return bytes(changed)


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    data, path = encode_mp4(clip()), tmp_path / "x.mp4"
    wave = b"RIFF" + struct.pack("<I", 2036) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    hostile = {
        "the file is empty": b"",
        "holds no video": wave + b"data" + struct.pack("<I", 2000) + bytes(2000),
        "not a readable video": b"no video" * 500,
        "not a readable video ": bytes(5000),
        "not a readable video (": data[: len(data) // 2],
        "not a readable video (Invalid": patch(data, b"stsz", 12, 2**31 - 1),  # that many samples
        "its header describes more than": patch(data, b"stts", 12, 2**31 - 1),
        "needs more than": patch(data, b"stts", 8, 2**31 - 1),
        "holds no video frame": patch(data, b"stsz", 8, 2**30),  # samples of that size
        "not a readable video (Inv": f"#EXTM3U\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n".encode(),  # opens no other file
        "(Operation not permitted)": f"ffconcat version 1.0\nfile '{path}'\n".encode(),
    }
    path.write_bytes(data)
    for reason, content in hostile.items():
        for read in (probe_video, lambda content: read_video(content, 9, 64, 64)):
            with pytest.raises(VideoError) as error:
                read(content)
            assert str(error.value).startswith("<bytes>: ") and reason in str(error.value)
    with pytest.raises(VideoError, match=r"nowhere\.mp4: No such file"):
        read_video(tmp_path / "nowhere.mp4", 9, 64, 64)
    assert read_video(data, 9, 64, 64).shape == (9, 3, 64, 64)


def test_damaged_packets_are_skipped() -> None:
    data = bytearray(video_matrix.remux(*video_matrix.encode("libx264", video_matrix.INTRA), "mp4", "whole"))
    start = data.index(b"mdat") + 4
    size = (len(data) - start) // 2
    data[start + size // 2 : start + size] = os.urandom(size - size // 2)
    frames = read_video(bytes(data), 2, 96, 160).permute(0, 2, 3, 1).numpy()
    assert [video_matrix.number_of(frame) for frame in frames] == [0, 59]


def test_mutated_files_are_read_or_refused() -> None:
    """UNIVIGU_MUTATIONS=1500 tests as many."""
    rng, files, read = random.Random(0), videos_to_mutate(), 0
    for number in range(int(os.environ.get("UNIVIGU_MUTATIONS", "70"))):
        data = mutate(rng, files[number % len(files)])
        try:
            probe_video(data)
            read += read_video(data, 9, 64, 64).shape == (9, 3, 64, 64)
        except VideoError as error:
            assert "the decoder" not in str(error)  # it need not die of these
    assert read


@pytest.mark.slow
def test_a_decoder_that_hangs_or_dies_costs_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "DECODE_SECONDS", 1)
    data = encode_mp4(clip())
    os.mkfifo(tmp_path / "hangs.mp4")  # nobody ever writes to it
    with pytest.raises(VideoError, match=r"hangs\.mp4: .*took longer than 1 s"):
        read_video(tmp_path / "hangs.mp4", 9, 64, 64)
    assert read_video(data, 9, 64, 64).shape == (9, 3, 64, 64)
    first = video._decoder.process
    assert first is not None
    threading.Timer(0.1, first.terminate).start()
    with pytest.raises(VideoError, match=r"hangs\.mp4: .*died"):
        read_video(tmp_path / "hangs.mp4", 9, 64, 64)
    assert read_video(data, 9, 64, 64).shape == (9, 3, 64, 64)


def test_a_forked_process_has_a_decoder_of_its_own() -> None:
    data = encode_mp4(clip())
    expected = read_video(data, 9, 64, 64)
    child = os.fork()
    if not child:
        same = np.array_equal(read_video(data, 9, 64, 64), expected)  # torch's threads are the parent's
        video._decoder.stop()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(read_video(data, 9, 64, 64), expected)


def test_threads_share_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = [], video._Decoder._start
    monkeypatch.setattr(video._Decoder, "_start", lambda self: (started.append(self), start(self))[1])
    video._decoder.stop()  # all threads find none
    datas = [encode_mp4(clip(64, 64 + 16 * number)) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda data: read_video(data, 9, 64, 64), datas))
    assert all(torch.equal(result, read_video(data, 9, 64, 64)) for result, data in zip(results, datas, strict=True))
    assert started == [video._decoder]


@pytest.mark.slow
def test_the_decoders_memory_stays_flat() -> None:
    """UNIVIGU_READS=10000 reads as often."""

    def resident() -> int:  # KiB
        assert video._decoder.process is not None
        status = Path(f"/proc/{video._decoder.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))

    clips, before = [encode_mp4(clip(64 + 16 * number, 64)) for number in range(3)], 0
    for number in range(int(os.environ.get("UNIVIGU_READS", "1500"))):
        read_video(clips[number % 3], 9, 64, 64)
        if number % 5 == 0:
            with pytest.raises(VideoError):
                read_video(clips[0][: len(clips[0]) // 2], 9, 64, 64)
        if number == 299:  # what libraries keep for themselves is there by now
            before = resident()
    assert resident() - before < 4 * 1024


# --- written videos


@pytest.mark.parametrize("size", [(64, 64), (480, 832), (720, 1280), (1080, 1920)])
def test_written_colours_are_named_and_read_back(size: tuple[int, int]) -> None:
    height, width = size
    colours = torch.tensor([RED, GREEN, BLUE, BLACK, (255, 255, 255), (200, 120, 40), (20, 220, 130), (128, 128, 128)])
    frames = colours.to(torch.uint8).repeat_interleave(width // 8, 0).T[None, :, None].expand(2, 3, height, width)
    data = encode_mp4(frames)
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        matrix = 1 if height > 576 else 6
        assert (context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1)
        assert context.colorspace == matrix
    inside = torch.arange(width) % (width // 8)
    inside = (inside >= 2) & (inside < width // 8 - 2)  # chroma has half the resolution
    for found in (read_video(data, 2, height, width), decode(data)):
        assert (found.float() - frames.float())[..., inside].abs().max() <= 3


@pytest.mark.parametrize(("size", "most", "lossless"), [((64, 64), 9, 6), ((480, 832), 7, 3), ((1080, 1920), 6, 3)])
def test_written_gradients_are_read_back(size: tuple[int, int], most: int, lossless: int) -> None:
    """Of lossless files, accurately converted, 4:2:0 in 8 bits alone is left."""
    height, width = size
    across, down = torch.linspace(0, 255, width).expand(height, width), torch.linspace(0, 255, height)[:, None]
    ramps = torch.stack([across, down.expand(height, width), 255 - across])
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(255 * torch.rand(1, 3, 5, 7), size, mode="bicubic").clamp(0, 255)
    for frames in (ramps[None].round(), smooth.round())[
        : 1 if height < 480 else 2
    ]:  # 35 pixels each way are not smooth
        error = (read_video(encode_mp4(frames.byte()), 1, height, width) - frames).abs()
        assert error.max() <= most and (error > 3).float().mean() < (0.2 if height < 480 else 0.03)
        exact = decode(encode_mp4(frames.byte(), crf=0), Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT)
        assert (exact - frames).abs().max() <= lossless


def decode(data: bytes, flags: Interpolation = Interpolation.BILINEAR) -> torch.Tensor:
    """By PyAV's default, the quick conversion, which does as the file says; or with other flags."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24", interpolation=flags) for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def test_embedded_clips_keep_their_pixels() -> None:
    """What is read of them is what FFmpeg's quick conversion gives, with which the shipped models were trained."""
    data = encode_mp4(clip())
    assert torch.equal(read_video(data, 9, 64, 64), decode(data))
    assert data == encode_mp4(clip())
