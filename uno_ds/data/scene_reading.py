"""Compares a text about a scene with the scene, by program: what its words say of count, colours,
shapes and relation, whatever the wording of the embedded set it has."""

import re
from collections import Counter
from typing import NamedTuple

from uno_ds.data.scene_drawing import COLOURS, OPPOSITE, SHAPES, Scene, Thing, relations_of
from uno_ds.data.scene_language import NUMBERS, PLACE_PHRASES, RELATION_PHRASES, SIDE_OF_RELATION

_COUNTS = {"a": 1, **{word: number for number, word in NUMBERS.items()}}
_SIDES = {phrase: place for place, phrase in PLACE_PHRASES.items()}
_RELATIONS = {phrase: relation for relation, phrase in RELATION_PHRASES.items()}
_RELATION_OF_SIDE = {side: relation for relation, side in SIDE_OF_RELATION.items()}
# Longer phrases first: "to the left of" holds none of the places, "on the left" is one.
_WORDS = re.compile(
    rf"\b(?P<number>{'|'.join(_COUNTS)}) (?P<colour>{'|'.join(COLOURS)}) "
    rf"(?P<shape>{'|'.join(SHAPES)})(?:e?s)?\b"
    rf"|(?P<relation>{'|'.join(_RELATIONS)})\b|(?P<place>{'|'.join(_SIDES)})\b"
)


class Reading(NamedTuple):
    """What a text says. things: (shape, colour) with its number; relations: of the first thing to
    the second, to the third; place: of a single thing. None or empty: the text does not say."""

    things: Counter[tuple[str, str]]
    order: tuple[tuple[str, str], ...]
    relations: tuple[str, ...]
    place: str | None


def read(text: str) -> Reading:
    """Words beyond the vocabulary of the embedded set say nothing."""
    things: Counter[tuple[str, str]] = Counter()
    order: list[tuple[str, str]] = []
    relations: list[str] = []
    places: list[str] = []
    for match in _WORDS.finditer(text.lower()):
        if match["shape"]:
            thing = (match["shape"], match["colour"])
            things[thing] += _COUNTS[match["number"]]
            order.append(thing)
        elif match["relation"]:
            relations.append(_RELATIONS[match["relation"]])
        else:
            places.append(_SIDES[match["place"]])
    # "there is a X on the left and a Y on the right."
    if not relations and len(order) == 2 and places[:1] and places[0] in _RELATION_OF_SIDE:
        relations.append(_RELATION_OF_SIDE[places[0]])
    place = places[0] if places and len(order) == 1 else None
    return Reading(things, tuple(order), tuple(relations), place)


def score_text(text: str, scene: Scene) -> dict[str, bool]:
    """What of `scene` the text says rightly, under the names of `scene_score.score`. `relation`
    holds where the text says nothing of it, as one of the set's wordings does. `all` needs the
    four, and each shape in its colour."""
    found = read(text)
    objects = scene["objects"]
    wanted = Counter((thing["shape"], thing["colour"]) for thing in objects)
    colours = Counter(thing["colour"] for thing in objects)
    shapes = Counter(thing["shape"] for thing in objects)
    count = found.things.total() == len(objects)
    relation = _relation_holds(found, scene)
    return {
        "count": count,
        "colours": _totals(found.things, 1) == colours,
        "shapes": _totals(found.things, 0) == shapes,
        "relation": relation,
        "all": count and found.things == wanted and relation,
    }


def _totals(things: Counter[tuple[str, str]], part: int) -> Counter[str]:
    totals: Counter[str] = Counter()
    for thing, number in things.items():
        totals[thing[part]] += number
    return totals


def _relation_holds(found: Reading, scene: Scene) -> bool:
    if scene["place"] is not None:
        return found.place in (None, scene["place"])
    named = relations_of(scene)
    if not named or not found.relations:
        return True
    if len(found.order) != len(scene["objects"]):
        return False
    right = {(_look(thing), relation, _look(other)) for thing, relation, other in named}
    right |= {(_look(other), OPPOSITE[relation], _look(thing)) for thing, relation, other in named}
    said = zip(found.relations, found.order[1:], strict=False)
    return all((found.order[0], relation, other) in right for relation, other in said)


def _look(thing: Thing) -> tuple[str, str]:
    return thing["shape"], thing["colour"]
