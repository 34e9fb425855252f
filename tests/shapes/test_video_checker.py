"""The video checker: right on rendered, compressed and degraded clips, and no error on random ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from univigu.data.video import encode_mp4, read_video
from univigu.shapes.metrics import AttributeAccuracy, reading_of, score
from univigu.shapes.renderer import render
from univigu.shapes.scenes import BACKGROUNDS, Object, Scene, sample_scene
from univigu.shapes.text_checker import Reading
from univigu.shapes.video_checker import detect

SCENES = [sample_scene(seed, split) for split in ("train", "val") for seed in range(1000, 1040)]
CIRCLE = Object("large", "purple", "circle", "left", "slowly", 45.0, 20.0)


def degrade(frames: torch.Tensor, seed: int) -> torch.Tensor:
    """Blur (sigma 0.7 pixels), colour shift (up to 15 a channel) and noise (std 6), as a small VAE leaves behind."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.exp(-(torch.arange(-3, 4).float() ** 2) / (2 * 0.7**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, 7)
    image = F.pad(frames.float(), (3, 3, 3, 3), mode="replicate").flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(image, kernel), kernel.transpose(2, 3)).view(frames.shape)
    shift = torch.rand(1, 3, 1, 1, generator=generator) * 30 - 15
    noise = 6 * torch.randn(frames.shape, generator=generator)
    return (blurred + shift + noise).round().clamp(0, 255).to(torch.uint8)


def accuracies(clips: list[torch.Tensor]) -> dict[str, float]:
    metric = AttributeAccuracy()
    metric.update([score(detect(clip), scene) for clip, scene in zip(clips, SCENES, strict=True)])
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.fixture(scope="module")
def clips() -> list[torch.Tensor]:
    return [render(scene) for scene in SCENES]


@pytest.fixture(scope="module")
def degraded(clips) -> list[torch.Tensor]:
    return [degrade(clip, seed) for seed, clip in enumerate(clips)]


@pytest.mark.slow
@pytest.mark.parametrize(("treatment", "least"), [("rendered", 0.99), ("degraded, mp4", 0.97)])
def test_every_attribute_is_read(clips, degraded, treatment, least):
    seen = degraded if "degraded" in treatment else clips
    if "mp4" in treatment:
        seen = [read_video(encode_mp4(clip), 9, 64, 64) for clip in seen]
    result = accuracies(seen)
    assert len(result) == 12
    assert min(result.values()) >= least, result


def test_centers_are_within_a_pixel(clips):
    for clip, scene in zip(clips[:20], SCENES, strict=False):
        order = detect(clip).objects
        truth = reading_of(scene, "video").objects
        if len(order) == len(truth) == 1:
            assert order[0].center == pytest.approx(truth[0].center, abs=1.0)


@pytest.mark.parametrize(("height", "width", "frames"), [(128, 128, 9), (96, 160, 17), (48, 48, 5), (240, 416, 9)])
def test_any_size_and_length(height, width, frames):
    results = [score(detect(render(scene, height, width, frames)), scene) for scene in SCENES[:5] + SCENES[-5:]]
    right = [value for result in results for value in result.values()]
    assert sum(right) / len(right) >= 0.99


@pytest.mark.parametrize("name", list(BACKGROUNDS))
def test_empty_video(name):
    clip = torch.tensor(BACKGROUNDS[name], dtype=torch.uint8).view(1, 3, 1, 1).expand(9, 3, 64, 64)
    assert detect(clip) == Reading("video", 0, name)
    assert detect(degrade(clip, 0)) == Reading("video", 0, name)


@pytest.mark.parametrize(("value", "background"), [(0, "black"), (255, "white"), (70, None)])
def test_blank_frames(value, background):
    assert detect(torch.full((9, 3, 64, 64), value, dtype=torch.uint8)) == Reading("video", 0, background)


def test_noise_and_odd_clips_do_not_fail():
    generator = torch.Generator().manual_seed(0)
    metric = AttributeAccuracy()
    clips = (
        torch.randint(0, 256, (9, 3, 64, 64), generator=generator),
        torch.randint(0, 256, (9, 3, 8, 8), generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3),
        torch.randint(0, 2, (9, 3, 64, 64), generator=generator) * 255,
        torch.randint(0, 256, (1, 3, 1, 1), generator=generator),
        torch.arange(64).view(1, 1, 1, 64).expand(9, 3, 64, 64) * 4,
    )
    for clip in clips:
        metric.update([score(detect(clip.to(torch.uint8)), SCENES[0])])
    values = torch.stack(list(metric.compute().values()))
    assert torch.isfinite(values).all()
    assert values.max() < 1


def test_a_single_frame_has_no_motion():
    reading = detect(render(Scene((CIRCLE,), "gray", ""))[:1])
    circle = reading.objects[0]
    assert (circle.shape, circle.color, circle.motion, circle.speed) == ("circle", "purple", None, None)


def test_two_objects_of_one_color_are_counted():
    twin = Object("small", "purple", "circle", "still", "", 20.0, 50.0)
    assert detect(render(Scene((CIRCLE, twin), "gray", "above"))).count == 2


def test_three_objects_are_counted():
    others = [Object("small", color, "square", "still", "", x, 50.0) for color, x in (("red", 12.0), ("cyan", 40.0))]
    reading = detect(render(Scene((CIRCLE, *others), "gray", "")))
    assert (reading.count, len(reading.objects), reading.relation) == (3, 3, None)


def test_an_object_that_is_seen_in_half_of_the_clip_only():
    clip, empty = render(Scene((CIRCLE,), "gray", "")), render(Scene((), "gray", ""))
    assert detect(torch.cat([clip[:4], empty[4:]])).count == 0
    late = detect(torch.cat([empty[:2], clip[2:]])).objects[0]
    assert (late.motion, late.start, late.end) == ("left", None, "upper center")


def test_diagonal_motion_and_unknown_shapes_are_none():
    steps = [Object("small", "red", "square", "still", "", 12 + 3.0 * i, 12 + 3.0 * i) for i in range(9)]
    clip = torch.stack([render(Scene((step,), "black", ""))[0] for step in steps])
    square = detect(clip).objects[0]
    assert (square.shape, square.motion, square.speed) == ("square", None, "quickly")
    bar = torch.full((9, 3, 64, 64), 128, dtype=torch.uint8)
    bar[:, :, 30:36, 8:56] = torch.tensor([220, 40, 40], dtype=torch.uint8).view(3, 1, 1)
    assert detect(bar).objects[0].shape is None


def test_a_large_triangle_without_its_tip_is_large():
    """As after a blur: its box is that of a small object, everything else is not."""
    triangle = Object("large", "red", "triangle", "still", "", 32.0, 32.0)
    clip = render(Scene((triangle,), "black", ""))
    clip[:, :, : 32 - 15 + 9] = clip[0, :, 0, 0].view(3, 1, 1)  # 9 of its 30 rows
    found = detect(clip).objects[0]
    assert (found.size, found.shape) == ("large", "triangle")


def test_unknown_color_is_none():
    clip = render(Scene((CIRCLE,), "black", ""))
    gray = clip.amax(1, keepdim=True).expand(-1, 3, -1, -1)
    reading = detect(gray)
    assert (reading.count, reading.objects[0].color, reading.objects[0].shape) == (1, None, "circle")


def test_on_a_diagonal_both_relations_hold():
    first = Object("small", "red", "ring", "still", "", 12.0, 50.0)
    second = Object("small", "blue", "ring", "still", "", 50.0, 12.0)
    clip = render(Scene((first, second), "gray", "left of"))
    reading = detect(clip)
    assert {reading.relation, reading.other_relation} == {"left of", "above"}
    for scene in (Scene((first, second), "gray", "left of"), Scene((second, first), "gray", "above")):
        assert all(score(reading, scene).values())
    assert not score(reading, Scene((second, first), "gray", "left of"))["color"]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((9, 3, 64, 64), torch.float32, r"expected uint8 \[F, 3, H, W\] with F > 0, got torch.float32"),
        ((3, 64, 64), torch.uint8, r"got torch.uint8 \[3, 64, 64\]"),
        ((0, 3, 64, 64), torch.uint8, r"got torch.uint8 \[0, 3, 64, 64\]"),
        ((9, 1, 64, 64), torch.uint8, r"got torch.uint8 \[9, 1, 64, 64\]"),
    ],
)
def test_wrong_input_is_named(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        detect(torch.zeros(shape, dtype=dtype))
