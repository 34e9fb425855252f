"""Writes the texts of the embedded world: for each scene a brief prompt, a detailed caption, and questions."""

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
    for name, obj in zip(names, scene.objects, strict=True):
        motion = f"moves {obj.motion} {obj.speed} in a straight line"
        if obj.motion == "still":
            motion = "stays still in the same place"
        start, end = region_of(obj.center(0)), region_of(obj.center(NUM_FRAMES - 1))
        parts.append(
            f"{name} is a {obj.size} {obj.color} {obj.shape}. it is filled with an even {obj.color} from edge to edge "
            f"and its outline is that of a {obj.shape}. when the clip begins it is in the {start} part of the "
            f"frame. it {motion} without turning. when the clip ends it is in the {end} part of "
            f"the frame, and it still looks {obj.size} beside the frame."
        )
    if scene.relation:
        parts.append(f"the first object is {scene.relation} the second object for the whole clip.")
    parts.append(
        f"the {scene.background} background keeps the same shade in every frame. nothing else appears, nothing "
        "enters or leaves the frame, the camera does not move, the light is even, and there is no text in the picture."
    )
    return " ".join(parts)


def region_of(center: tuple[float, float]) -> str:
    """Name of the ninth of the frame that contains a point (x, y) in canvas pixels, such as "upper left"."""
    column, row = (min(max(int(3 * value / CANVAS), 0), 2) for value in center)
    return f"{('upper', 'middle', 'lower')[row]} {('left', 'center', 'right')[column]}"


def questions_of(scene: Scene) -> list[dict[str, str]]:
    """Questions about a scene with their answers, as ``{"kind", "question", "answer"}``.

    The kinds: count, background, relation, and of each object color, shape, size, motion, start and end. One of two
    objects is named by properties that are not asked for; where that name fits both, the question is left out.
    """
    count = "two objects." if len(scene.objects) == 2 else "one object."
    asked: list[tuple[str, str, str]] = [
        ("count", "how many objects are there?", count),
        ("background", "what color is the background?", f"{scene.background}."),
    ]
    for obj in scene.objects:
        motion = "it stays still." if obj.motion == "still" else f"it moves {obj.motion} {obj.speed}."
        if name := _unique_name(obj, scene, "size", "shape"):
            asked.append(("color", f"what color is {name}?", f"{obj.color}."))
        if name := _unique_name(obj, scene, "size", "color"):
            asked.append(("shape", f"what shape is {name}?", f"a {obj.shape}."))
        if name := _unique_name(obj, scene, "color", "shape"):
            asked += [
                ("size", f"how large is {name}?", f"{obj.size}."),
                ("motion", f"how does {name} move?", motion),
                ("start", f"where is {name} when the clip begins?", f"{region_of(obj.center(0))}."),
                ("end", f"where is {name} when the clip ends?", f"{region_of(obj.center(NUM_FRAMES - 1))}."),
            ]
    if scene.relation:
        first, second = (_unique_name(obj, scene, "color", "shape") for obj in scene.objects)
        side, opposite = {"left of": ("left.", "right."), "above": ("above.", "below.")}[scene.relation]
        if first and second:
            asked.append(("relation", f"where is {first}, seen from {second}?", side))
            asked.append(("relation", f"where is {second}, seen from {first}?", opposite))
    return [{"kind": kind, "question": question, "answer": answer} for kind, question, answer in asked]


def _unique_name(obj: Object, scene: Scene, *properties: str) -> str | None:
    """An object's name by two of its properties, such as "the red circle"; None if it fits the other object, too."""
    if len(scene.objects) == 1:
        return "the object"
    named = [[getattr(candidate, name) for name in properties] for candidate in scene.objects]
    if named[0] == named[1]:
        return None
    noun = [] if "shape" in properties else ["object"]
    return " ".join(["the", *(getattr(obj, name) for name in properties), *noun])
