"""A text about a scene is judged by what it says, in every wording of the embedded set."""

import numpy as np
import pytest

from uno_ds.data.scene_drawing import COLOURS, KINDS, make_scene
from uno_ds.data.scene_language import captions
from uno_ds.data.scene_reading import read, score_text

RIGHT = {"count": True, "colours": True, "shapes": True, "relation": True, "all": True}


@pytest.mark.parametrize("kind", KINDS)
def test_every_wording_of_a_scene_says_it_rightly_and_of_another_scene_does_not(kind):
    scenes = [make_scene(kind, np.random.default_rng(seed)) for seed in range(30)]
    for scene in scenes:
        for text in captions(scene):
            assert score_text(text, scene) == RIGHT, text
        # The first two wordings name everything that is judged.
        for other in scenes:
            if captions(other)[0] not in captions(scene):
                assert not score_text(captions(other)[0], scene)["all"]


def test_each_fault_is_told_apart():
    scene = make_scene("pair", np.random.default_rng(0))
    first, second = scene["objects"]
    text = captions(scene)[0]
    swapped = text.replace(first["shape"], "?").replace(second["shape"], first["shape"])
    swapped = swapped.replace("?", second["shape"])
    assert score_text(swapped, scene) == RIGHT | {"relation": False, "all": False}
    colour = next(c for c in COLOURS if c not in (first["colour"], second["colour"]))
    recoloured = score_text(text.replace(first["colour"], colour), scene)
    assert (recoloured["colours"], recoloured["shapes"], recoloured["all"]) == (False, True, False)
    mirrored = text.replace("left", "?").replace("right", "left").replace("?", "right")
    mirrored = mirrored.replace("above", "?").replace("below", "above").replace("?", "below")
    assert score_text(mirrored, scene) == RIGHT | {"relation": False, "all": False}


@pytest.mark.parametrize("text", ["", "a cup on a table", "red red red", "\u2028 left of"])
def test_other_texts_say_nothing(text):
    assert not read(text).things
    assert not score_text(text, make_scene("one", np.random.default_rng(1)))["all"]


def test_a_wrong_count_is_a_wrong_count():
    scene = make_scene("count", np.random.default_rng(2))
    thing = scene["objects"][0]
    text = f"one {thing['colour']} {thing['shape']}."
    assert not score_text(text, scene)["count"]
