"""Writes the texts of the embedded world: a brief prompt and a detailed caption for each scene."""

from __future__ import annotations

from univigu.shapes.scenes import CANVAS, NUM_FRAMES, Object, Scene


def prompt_of(scene: Scene) -> str:
    """The brief prompt, 12 to 30 tokens: everything but the positions."""
    objects = f", {scene.relation} ".join(_object_phrase(obj) for obj in scene.objects)
    return f"{objects}, on a {scene.background} background"


def _object_phrase(obj: Object) -> str:
    motion = "staying still" if obj.motion == "still" else f"moving {obj.motion} {obj.speed}"
    return f"a {obj.size} {obj.color} {obj.shape} {motion}"


def caption_of(scene: Scene) -> str:
    """The detailed caption, 128 to 256 tokens with the shipped tokenizer.

    It repeats what the prompt says and adds what only the video shows: where each object starts and ends.
    """
    count, names = "one object", ["the object"]
    if len(scene.objects) == 2:
        count, names = "two objects", ["the first object", "the second object"]
    parts = [f"the video shows {count} on a plain {scene.background} background."]
    parts += [_object_paragraph(name, obj) for name, obj in zip(names, scene.objects, strict=True)]
    if scene.relation:
        parts.append(f"the first object is {scene.relation} the second object for the whole clip.")
    parts.append(
        f"the {scene.background} background keeps the same shade in every frame. nothing else appears, nothing "
        "enters or leaves the frame, the camera does not move, the light is even, and there is no text in the picture."
    )
    return " ".join(parts)


def _object_paragraph(name: str, obj: Object) -> str:
    motion = f"moves {obj.motion} {obj.speed} in a straight line"
    if obj.motion == "still":
        motion = "stays still in the same place"
    start, end = region_of(obj.center(0)), region_of(obj.center(NUM_FRAMES - 1))
    return (
        f"{name} is a {obj.size} {obj.color} {obj.shape}. it is filled with an even {obj.color} from edge to edge "
        f"and its outline is that of a {obj.shape}. when the clip begins it is in the {start} part of the "
        f"frame. it {motion} without turning. when the clip ends it is in the {end} part of "
        f"the frame, and it still looks {obj.size} beside the frame."
    )


def region_of(center: tuple[float, float]) -> str:
    """Name of the ninth of the frame that contains a point (x, y) in canvas pixels, such as "upper left"."""
    column, row = (min(max(int(3 * value / CANVAS), 0), 2) for value in center)
    return f"{('upper', 'middle', 'lower')[row]} {('left', 'center', 'right')[column]}"
