"""Wrong captions of scenes are wrong by the scenes' own reader, of every kind, and there for every
scene."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from uno_ds.data.scene_drawing import KINDS, make_scene
from uno_ds.data.scene_language import captions
from uno_ds.data.scene_negatives import changes, wrong_captions
from uno_ds.data.scene_reading import score_text
from uno_ds.data.scenes import ScenesSettings, write


@pytest.mark.parametrize("kind", KINDS)
def test_every_negative_is_wrong_and_every_caption_right_by_the_reader(kind):
    rng = np.random.default_rng(0)
    wrong_in: Counter[str] = Counter()
    for _ in range(300):
        scene = make_scene(kind, rng)
        negatives = wrong_captions(scene, rng)
        assert len(negatives) >= 2 and not set(negatives) & set(captions(scene))
        for text in captions(scene):
            assert score_text(text, scene)["all"], text
        for text in negatives:
            said = score_text(text, scene)
            assert not said["all"], (text, scene)
            wrong_in.update(part for part in said if not said[part])
    assert {"colours", "shapes"} <= set(wrong_in)
    assert ("count" in wrong_in) == (kind == "count")
    # Of a single object "relation" is its place.
    assert ("relation" in wrong_in) == (kind != "count")


def test_exchanged_colours_are_wrong_although_all_words_are_there():
    rng = np.random.default_rng(1)
    scene = make_scene("pair", rng)
    *_, exchanged = changes(scene, rng)
    text = captions(exchanged)[0]
    said = score_text(text, scene)
    assert said["colours"] and said["shapes"] and said["count"] and not said["all"]


def test_a_change_leaves_the_scene_as_it_was():
    rng = np.random.default_rng(2)
    for kind in KINDS:
        scene = make_scene(kind, rng)
        before = repr(scene)
        list(changes(scene, rng))
        assert repr(scene) == before


def test_what_may_not_be_named_is_left_out_and_the_rest_stays():
    """Such as a held-out scene, as the wrong caption of another."""
    scene = make_scene("pair", np.random.default_rng(3))
    everything = wrong_captions(scene, np.random.default_rng(4))
    offered = []

    def may_name(changed):
        offered.append(changed)
        return len(offered) != 2

    some = wrong_captions(scene, np.random.default_rng(4), may_name)
    assert len(offered) == len(everything) == len(some) + 1 and set(some) < set(everything)
    (missing,) = set(everything) - set(some)
    assert missing in captions(offered[1])


def test_the_files_have_the_column_and_the_scenes_do_not_depend_on_it(tmp_path, monkeypatch):
    settings = ScenesSettings(rows=8, size=16)
    write(settings, tmp_path / "ours")
    monkeypatch.setattr("uno_ds.data.scenes.wrong_captions", lambda *_: ["none"])
    write(settings, tmp_path / "other")
    ours, other = (
        pq.read_table(tmp_path / name / "t2i/00000.parquet").to_pylist()
        for name in ("ours", "other")
    )
    for row, same in zip(ours, other, strict=True):
        assert row["negative_captions"] and same["negative_captions"] == ["none"]
        assert {**row, "negative_captions": None} == {**same, "negative_captions": None}
