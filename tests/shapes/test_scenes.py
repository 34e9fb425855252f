"""What the world draws is fixed by its seed, so data folders and checkpoints stay comparable."""

from __future__ import annotations

import hashlib
import json

from univigu.shapes.renderer import render
from univigu.shapes.scenes import is_held_out, is_scene, sample_scene
from univigu.shapes.texts import caption_of, prompt_of


def test_scenes_texts_and_frames_are_what_they_were() -> None:
    """Shipped weights were trained on these; other content needs a new foundation."""
    digest = hashlib.sha256()
    for split in ("train", "val", "test"):
        for seed in range(20):
            scene = sample_scene(seed, split)
            digest.update(json.dumps([scene.to_dict(), prompt_of(scene), caption_of(scene)]).encode())
    digest.update(render(sample_scene(3)).numpy().tobytes())
    digest.update(render(sample_scene(4), 96, 160, 17).numpy().tobytes())
    assert digest.hexdigest()[:16] == "2801424fb17931c0"


def test_training_never_shows_a_held_out_triple() -> None:
    for seed in range(50):
        assert not any(map(is_held_out, sample_scene(seed, "train").objects))
        assert any(map(is_held_out, sample_scene(seed, "val").objects))


def test_other_descriptions_are_no_scenes() -> None:
    scene = sample_scene(0).to_dict()
    assert is_scene(scene)
    for other in (None, 3, "a beach", {}, {"weather": "fog"}, scene | {"background": "pink"}, scene | {"objects": []}):
        assert not is_scene(other)
    assert not is_scene(scene | {"objects": [scene["objects"][0] | {"x": float("nan")}]})
