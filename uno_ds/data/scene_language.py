"""The sentences that belong to scenes: captions, questions with answers, edit instructions. A
small, fixed vocabulary."""

import itertools

from uno_ds.data.scene_drawing import (
    OPPOSITE,
    Scene,
    Thing,
    relations_of,
)

NUMBERS = {1: "one", 2: "two", 3: "three"}
PLACE_PHRASES = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
RELATION_PHRASES = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
SIDE_OF_RELATION = {"left": "left", "right": "right", "above": "top", "below": "bottom"}


def captions(scene: Scene) -> list[str]:
    """At least four wordings; the first two name everything that `scene_score.score` judges."""
    first = scene["objects"][0]
    if scene["kind"] == "count":
        what = f"{NUMBERS[len(scene['objects'])]} {first['colour']} {plural(first['shape'])}"
        return [
            f"{what}.",
            f"there are {what}.",
            f"a picture of {what}.",
            f"the picture shows {what}.",
        ]
    if scene["kind"] == "one":
        what, where = a_thing(first), PLACE_PHRASES[scene["place"] or "center"]
        return [
            f"{what} {where}.",
            f"there is {what} {where}.",
            f"the picture shows {what} {where}.",
            f"{where} there is {what}.",
            f"a picture of {what}.",
        ]
    if scene["kind"] == "triple":
        return _captions_of_triple(scene)
    assert scene["kind"] == "pair", scene["kind"]
    relation = scene["relation"] or "left"
    what = a_thing(first)
    other = a_thing(scene["objects"][1])
    here = PLACE_PHRASES[SIDE_OF_RELATION[relation]]
    there = PLACE_PHRASES[SIDE_OF_RELATION[OPPOSITE[relation]]]
    return [
        f"{what} {RELATION_PHRASES[relation]} {other}.",
        f"{other} {RELATION_PHRASES[OPPOSITE[relation]]} {what}.",
        f"there is {what} {here} and {other} {there}.",
        f"the picture shows {other} {there} and {what} {here}.",
        f"a picture of {what} and {other}.",
    ]


def _captions_of_triple(scene: Scene) -> list[str]:
    what = a_thing(scene["objects"][0])
    beside, over = (
        f"{RELATION_PHRASES[relation]} {a_thing(other)}"
        for _, relation, other in relations_of(scene)
    )
    return [
        f"{what} {beside} and {over}.",
        f"{what} {over} and {beside}.",
        f"there is {what} {beside} and {over}.",
        f"the picture shows {what} {over} and {beside}.",
        f"a picture of {what} {beside} and {over}.",
    ]


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Questions about a scene with their answers; "describe the picture." is left to the caller,
    who picks a caption."""
    things = scene["objects"]
    first, number = things[0], NUMBERS[len(things)]
    if scene["kind"] == "count":
        return [
            (f"how many {plural(first['shape'])} are there?", number),
            ("how many objects are there?", number),
            (f"what colour are the {plural(first['shape'])}?", first["colour"]),
            (f"what shape are the {first['colour']} objects?", first["shape"]),
        ]
    asked = [("how many objects are there?", number)]
    if scene["kind"] == "triple":
        for thing, relation, other in relations_of(scene):
            asked += _related(thing, relation, other)
        return asked + list(itertools.chain.from_iterable(map(_looks, things)))
    sides = [scene["place"]]
    if scene["kind"] == "pair":
        relation = scene["relation"] or "left"
        back = OPPOSITE[relation]
        sides = [SIDE_OF_RELATION[relation], SIDE_OF_RELATION[back]]
        asked += _related(first, relation, things[1])
    for thing, side in zip(things, sides):
        asked += _looks(thing)
        asked.append((f"where is the {thing['shape']}?", PLACE_PHRASES[side or "center"]))
    return asked


def _related(thing: Thing, relation: str, other: Thing) -> list[tuple[str, str]]:
    back = OPPOSITE[relation]
    return [
        (f"what is {RELATION_PHRASES[relation]} the {name(other)}?", a_thing(thing)),
        (f"what is {RELATION_PHRASES[back]} the {name(thing)}?", a_thing(other)),
    ]


def _looks(thing: Thing) -> list[tuple[str, str]]:
    return [
        (f"what colour is the {thing['shape']}?", thing["colour"]),
        (f"what shape is the {thing['colour']} object?", thing["shape"]),
    ]


def recolour_instructions(scene: Scene, thing: Thing, colour: str) -> list[str]:
    what, full = _mention(scene, thing)
    return [
        f"make the {what} {colour}.",
        f"change the colour of the {what} to {colour}.",
        f"turn the {full} {colour}.",
        f"paint the {full} {colour}.",
    ]


def reshape_instructions(scene: Scene, thing: Thing, shape: str) -> list[str]:
    what, full = _mention(scene, thing)
    new = plural(shape) if scene["kind"] == "count" else f"a {shape}"
    return [
        f"turn the {what} into {new}.",
        f"change the {full} into {new}.",
        f"make the {full} {new}.",
    ]


def remove_instructions(scene: Scene, thing: Thing) -> list[str]:
    what, full = _mention(scene, thing)
    return [f"remove the {what}.", f"take away the {full}.", f"remove the {full} from the picture."]


def add_instructions(result: Scene, added: int) -> list[str]:
    """Wordings of adding object number `added` of the pair `result` beside the other one."""
    thing, other = result["objects"][added], result["objects"][1 - added]
    relation = result["relation"] or "left"
    relation = relation if added == 0 else OPPOSITE[relation]
    where, beside = PLACE_PHRASES[SIDE_OF_RELATION[relation]], RELATION_PHRASES[relation]
    return [
        f"add {a_thing(thing)} {where}.",
        f"put {a_thing(thing)} {beside} the {other['shape']}.",
        f"add {a_thing(thing)} {beside} the {name(other)}.",
    ]


def name(thing: Thing) -> str:
    return f"{thing['colour']} {thing['shape']}"


def a_thing(thing: Thing) -> str:
    return f"a {name(thing)}"


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _mention(scene: Scene, thing: Thing) -> tuple[str, str]:
    shape = plural(thing["shape"]) if scene["kind"] == "count" else thing["shape"]
    return shape, f"{thing['colour']} {shape}"
