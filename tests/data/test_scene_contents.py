"""What a scene shows, apart from sizes and positions: triples, and contents that are held out."""

import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from uno_ds.data import scene_language, scenes
from uno_ds.data.scene_drawing import draw, make_scene
from uno_ds.data.scene_reading import score_text
from uno_ds.data.scene_score import score
from uno_ds.data.scenes import ScenesSettings, content_of, ensure, place_of_content, prompts, write
from uno_ds.settings import SettingsError, build


def triple(seed: int):
    return make_scene("triple", np.random.default_rng(seed))


def test_the_usual_prompts_and_folders_are_those_of_earlier_versions(tmp_path):
    """Prompts recorded before triples and held-out contents existed, folders with format 3."""
    text = json.dumps(prompts(ScenesSettings(), 64))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "3e5c8a5d13a02325"
    assert ensure(ScenesSettings(rows=40), tmp_path).name == "scenes-f3be8f62c743"
    other = ScenesSettings(rows=30, kinds={"one": 2, "pair": 1})
    assert ensure(other, tmp_path).name == "scenes-60a345e98718"
    assert ensure(ScenesSettings(rows=40, held_out=0.1), tmp_path).name != "scenes-f3be8f62c743"


def test_a_triple_fails_where_one_of_its_relations_is_turned():
    for seed in range(20):
        scene = triple(seed)
        first, second, third = scene["objects"]
        image = draw(scene, 32)
        assert score(image, scene)["all"]
        # Its other two objects exchanged: both relations are wrong, everything else is right.
        swapped = {**scene, "objects": [first, third, second]}
        found = score(image, swapped)
        assert not found["relation"] and found["count"] and found["colours"] and found["shapes"]
        opposite = {"above": "below", "below": "above"}[scene["second_relation"]]
        assert not score(image, {**scene, "second_relation": opposite})["relation"]
        for text in scene_language.captions(scene):
            wrong = text.replace(scene["second_relation"], opposite)
            assert score_text(text, scene)["all"] and not score_text(wrong, scene)["all"]


def test_two_wordings_of_one_picture_have_one_content_and_other_pictures_another():
    pair = make_scene("pair", np.random.default_rng(0))
    back = {"left": "right", "right": "left", "above": "below", "below": "above"}
    reversed_ = {
        **pair,
        "objects": pair["objects"][::-1],
        "relation": back[pair["relation"]],
    }
    assert content_of(pair) == content_of(reversed_)
    assert content_of(pair) != content_of({**pair, "relation": back[pair["relation"]]})
    moved = [{**thing, "x": thing["x"] + 0.01, "size": 0.3} for thing in pair["objects"]]
    assert content_of({**pair, "objects": moved}) == content_of(pair)
    two, three = (
        {**make_scene("count", np.random.default_rng(1)), "objects": [pair["objects"][0]] * number}
        for number in (2, 3)
    )
    assert content_of(two) != content_of(three)
    contents = {content_of(triple(seed)) for seed in range(200)}
    assert len(contents) > 150
    places = [place_of_content(triple(seed)) for seed in range(400)]
    assert 0.4 < np.mean(places) < 0.6 and min(places) >= 0 and max(places) < 1


def test_no_set_holds_a_scene_that_is_held_out_and_prompts_of_a_part_are_all_of_it(tmp_path):
    kinds = {"one": 1.0, "count": 1.0, "pair": 1.0, "triple": 1.0}
    settings = ScenesSettings(rows=120, kinds=kinds, vlm_rows=90, vlm_kinds=kinds, held_out=0.5)
    write(settings, tmp_path / "drawn")
    drawn = [
        json.loads(row["scene"])
        for row in pq.read_table(tmp_path / "drawn/t2i/00000.parquet").to_pylist()
    ]
    for row in pq.read_table(tmp_path / "drawn/edit/00000.parquet").to_pylist():
        drawn += json.loads(row["scene"])
    lines = (tmp_path / "drawn/vlm/conversations.jsonl").read_text().splitlines()
    drawn += [json.loads(line)["scene"] for line in lines]
    assert len(lines) == 90 and len(drawn) > 120 + 240
    assert {scene["kind"] for scene in drawn} == set(kinds)
    trained = {content_of(scene) for scene in drawn}
    assert all(place_of_content(scene) >= 0.5 for scene in drawn)

    parts = [prompts(settings, 60, seed, part) for seed, part in ((1, (0, 0.25)), (2, (0.25, 0.5)))]
    held_out = [{content_of(scene) for _, scene in part} for part in parts]
    assert not held_out[0] & held_out[1]
    assert not (held_out[0] | held_out[1]) & trained
    assert prompts(settings, 60, 1, (0, 0.25))[:20] == prompts(settings, 20, 1, (0, 0.25))


def test_the_conversations_may_have_other_kinds_and_another_number(tmp_path):
    settings = build(ScenesSettings, {"rows": 8, "kinds": {"one": 1}, "vlm_kinds": {"triple": 1}})
    write(settings, tmp_path / "drawn")
    rows = pq.read_table(tmp_path / "drawn/t2i/00000.parquet").to_pylist()
    assert {json.loads(row["scene"])["kind"] for row in rows} == {"one"}
    lines = (tmp_path / "drawn/vlm/conversations.jsonl").read_text().splitlines()
    assert [json.loads(line)["scene"]["kind"] for line in lines] == ["triple"] * 2
    with pytest.raises(SettingsError) as caught:
        build(ScenesSettings, {"vlm_kinds": {"triangle": 1}}, "data.scenes")
    assert caught.value.key == "data.scenes.vlm_kinds.triangle"


def test_a_part_without_contents_is_refused_in_a_line(monkeypatch):
    monkeypatch.setattr(scenes, "MOST_DRAWS", 50)
    with pytest.raises(SettingsError, match="no scene of these kinds has a content between"):
        prompts(ScenesSettings(), 1, 1, (0.5, 0.5))
