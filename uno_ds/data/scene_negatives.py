"""Wrong captions of scenes: those of a scene that differs in one respect, checked by the reader."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from uno_ds.data.scene_drawing import COLOURS, OPPOSITE, PLACES, SHAPES, Scene, Thing
from uno_ds.data.scene_language import captions
from uno_ds.data.scene_reading import score_text


def wrong_captions(
    scene: Scene, rng: np.random.Generator, may_name: Callable[[Scene], bool] = lambda _: True
) -> list[str]:
    """One caption for each way in which the scene can be changed into one that `may_name` allows. A
    wording that is right for the scene all the same, because it says nothing of what was changed,
    is not chosen."""
    found: list[str] = []
    for changed in changes(scene, rng):
        wrong = [text for text in captions(changed) if not score_text(text, scene)["all"]]
        # Drawn in any case: the others do not depend on what is left out.
        chosen = str(rng.choice(wrong)) if wrong else None
        if chosen is not None and may_name(changed):
            found.append(chosen)
    return list(dict.fromkeys(found))


def changes(scene: Scene, rng: np.random.Generator) -> Iterator[Scene]:
    """The scene with another colour, shape, number, place or relation, or with the colours of its
    first two objects exchanged."""
    things = scene["objects"]
    colour = another(COLOURS, [thing["colour"] for thing in things], rng)
    recoloured = copy.deepcopy(scene)
    for thing in _touched(recoloured, rng):
        thing["colour"] = colour
    yield recoloured
    shape = another(SHAPES, [thing["shape"] for thing in things], rng)
    reshaped = copy.deepcopy(scene)
    for thing in _touched(reshaped, rng):
        thing["shape"] = shape
    yield reshaped
    if scene["kind"] == "count":
        number = 5 - len(things)  # two or three
        yield Scene(kind="count", objects=[things[0]] * number, place=None, relation=None)
    if scene["place"] is not None:
        elsewhere = another(PLACES, [scene["place"]], rng)
        yield Scene(kind="one", objects=things, place=elsewhere, relation=None)
    if scene["relation"] is not None:
        turned = copy.deepcopy(scene)
        turned["relation"] = OPPOSITE[scene["relation"]]
        yield turned
        if "second_relation" in scene:
            turned = copy.deepcopy(scene)
            turned["second_relation"] = OPPOSITE[scene["second_relation"]]
            yield turned
        exchanged = copy.deepcopy(scene)
        first, second, *_ = exchanged["objects"]
        first["colour"], second["colour"] = second["colour"], first["colour"]
        yield exchanged


def another(choices: Iterable[str], used: Sequence[str], rng: np.random.Generator) -> str:
    """A random one of the choices that are not used."""
    return str(rng.choice([choice for choice in choices if choice not in used]))


def _touched(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    """All of equal objects, one of two different ones."""
    things = scene["objects"]
    which = int(rng.integers(len(things)))
    return things if scene["kind"] == "count" else [things[which]]
