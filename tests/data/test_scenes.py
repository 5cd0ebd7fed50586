"""The embedded scenes: readable, distinguished by the scorer, and written whole and alike."""

import io
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
from folders import contents
from PIL import Image, ImageFilter

from uno_ds.data import scene_language, scenes
from uno_ds.data.scene_drawing import BACKGROUND, COLOURS, KINDS, SHAPES, Scene, draw, make_scene
from uno_ds.data.scene_score import find_objects, score
from uno_ds.data.scenes import ScenesSettings, edit_sequence, ensure, prompts, write
from uno_ds.settings import SettingsError, build

SMALL = ScenesSettings(rows=40)


def some_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [make_scene(KINDS[index % len(KINDS)], rng) for index in range(count)]


def same_content(first: Scene, second: Scene) -> bool:
    """Whether no program should tell a picture of one from the other's."""

    def content(scene: Scene) -> tuple:
        things = [(thing["shape"], thing["colour"]) for thing in scene["objects"]]
        backwards = scene["relation"] in ("right", "below")
        relation = {"right": "left", "below": "above"}.get(scene["relation"], scene["relation"])
        if scene["kind"] == "triple":
            return scene["relation"], scene["second_relation"], tuple(things)
        return scene["place"], relation, tuple(things[::-1] if backwards else things)

    return content(first) == content(second)


@pytest.mark.parametrize("size", [32, 48])
def test_the_scorer_accepts_98_percent_of_clean_scenes(size):
    scenes = some_scenes(450)
    right = sum(score(draw(scene, size), scene)["all"] for scene in scenes)
    assert right >= 0.98 * len(scenes)


def test_the_scorer_still_reads_blurred_noisy_and_faded_pictures():
    rng = np.random.default_rng(1)

    def harm(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.5)), dtype=np.float32)
        pixels = BACKGROUND + (pixels - BACKGROUND) * 0.85 + rng.normal(0, 12, pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    scenes = some_scenes(150, seed=2)
    assert sum(score(harm(draw(scene, 32)), scene)["all"] for scene in scenes) >= 0.95 * len(scenes)


def test_the_scorer_accepts_a_picture_for_its_own_content_and_for_no_other():
    some = [(scene, draw(scene, 32)) for scene in some_scenes(45, seed=3)]
    for (drawn, image), (wanted, _) in itertools.product(some, some):
        assert score(image, wanted)["all"] == same_content(drawn, wanted), (drawn, wanted)


def test_each_kind_of_mistake_is_named():
    """A picture with one thing wrong fails that key, keeps the others, and is not right as a
    whole."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        pair = make_scene("pair", rng)
        first, second = pair["objects"]
        colour = next(name for name in COLOURS if name not in (first["colour"], second["colour"]))
        shape = next(name for name in SHAPES if name not in (first["shape"], second["shape"]))
        mirrored = [
            {**thing, "x": 1 - thing["x"], "y": 1 - thing["y"]} for thing in pair["objects"]
        ]
        swapped = [{**first, "colour": second["colour"]}, {**second, "colour": first["colour"]}]
        wrong = {
            "colours": [{**first, "colour": colour}, second],
            "shapes": [{**first, "shape": shape}, second],
            "relation": mirrored,
            None: swapped,
        }
        for key, objects in wrong.items():
            result = score(draw({**pair, "objects": objects}, 32), pair)
            assert not result["all"]
            assert key is None or not result[key]
            assert all(result[other] for other in ("count", "colours", "shapes") if other != key)
        missing = score(draw({**pair, "objects": [first]}, 32), pair)
        assert not missing["count"] and not missing["all"]


def test_nothing_is_seen_in_an_empty_picture_and_nothing_right_in_noise():
    assert find_objects(Image.new("RGB", (32, 32), BACKGROUND)) == []
    rng = np.random.default_rng(5)
    for scene in some_scenes(30):
        assert not score(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), scene)[
            "all"
        ]


def test_a_relation_or_place_that_the_scene_does_not_name_is_not_judged():
    rng = np.random.default_rng(6)
    one, pair = make_scene("one", rng), make_scene("pair", rng)
    moved = {**one, "objects": [{**one["objects"][0], "x": 0.3, "y": 0.7}]}
    mirrored = {
        **pair,
        "objects": [
            {**thing, "x": 1 - thing["x"], "y": 1 - thing["y"]} for thing in pair["objects"]
        ],
    }
    for drawn, wanted in ((moved, {**one, "place": None}), (mirrored, {**pair, "relation": None})):
        assert score(draw(drawn, 32), wanted)["all"]


def test_palette_colours_are_far_apart_and_far_from_the_background():
    for first, second in itertools.combinations([*COLOURS.values(), BACKGROUND], 2):
        assert np.linalg.norm(np.subtract(first, second)) > 100


def test_objects_are_large_and_inside_the_picture():
    for scene in some_scenes(300, seed=7):
        for thing in scene["objects"]:
            pixels = thing["size"] * 32
            assert pixels >= (15.9 if scene["kind"] == "one" else 11.8)
            assert all(
                thing["size"] / 2 - 1e-3 <= thing[axis] <= 1 - thing["size"] / 2 + 1e-3
                for axis in "xy"
            )


def test_captions_are_four_different_wordings_that_tell_the_truth():
    words = {
        "left": "left",
        "right": "right",
        "above": ("above", "top"),
        "below": ("below", "bottom"),
    }
    for scene in some_scenes(90, seed=8):
        wordings = scene_language.captions(scene)
        assert len(set(wordings)) >= 4
        for wording in wordings:
            assert all(
                thing["colour"] in wording and thing["shape"] in wording
                for thing in scene["objects"]
            )
            assert ("two " in wording) == (scene["kind"] == "count" and len(scene["objects"]) == 2)
        if scene["kind"] == "pair":
            first, second = scene["objects"]
            straight, reversed_ = wordings[:2]
            assert straight.index(first["shape"]) < straight.index(second["shape"])
            assert reversed_.index(second["shape"]) < reversed_.index(first["shape"])
            assert any(word in straight for word in np.atleast_1d(words[scene["relation"]]))
            assert not any(word in reversed_ for word in np.atleast_1d(words[scene["relation"]]))


def test_questions_are_answered_from_the_picture():
    for scene in some_scenes(90, seed=9):
        seen = {thing.colour: thing for thing in find_objects(draw(scene, 32))}
        for question, answer in scene_language.questions(scene):
            if question.startswith("how many"):
                assert answer == scene_language.NUMBERS[len(find_objects(draw(scene, 32)))]
            elif question.startswith("what colour"):
                assert seen[answer].shape in question
            elif question.startswith("what shape"):
                assert any(
                    colour in question and thing.shape == answer for colour, thing in seen.items()
                )


def test_an_edit_changes_what_it_says_and_the_result_can_be_scored():
    rng = np.random.default_rng(10)
    actions = set()
    for _ in range(150):
        scenes, instructions = edit_sequence(ScenesSettings(), rng)
        assert len(instructions) == len(scenes) - 1
        for before, after, wordings in zip(scenes, scenes[1:], instructions):
            assert len(set(wordings)) >= 3
            assert (
                score(draw(after, 32), after)["all"] and not score(draw(before, 32), after)["all"]
            )
            actions.add((wordings[0].split()[0], len(after["objects"]) - len(before["objects"])))
            if len(after["objects"]) == len(before["objects"]):
                new = {(t["colour"], t["shape"]) for t in after["objects"]} - {
                    (t["colour"], t["shape"]) for t in before["objects"]
                }
                assert any(word in wordings[0] for pair in new for word in pair)
    assert actions == {("make", 0), ("turn", 0), ("remove", -1), ("add", 1)}


def test_the_written_sets_have_the_layouts_of_real_data_and_match_their_ground_truth(tmp_path):
    write(SMALL, tmp_path / "scenes")
    rows = pq.read_table(tmp_path / "scenes/t2i/00000.parquet").to_pylist()
    assert len(rows) == 40 and set(rows[0]) == {
        "image",
        "captions",
        "negative_captions",
        "scene",
    }
    for row in rows:
        scene = json.loads(row["scene"])
        assert score(Image.open(io.BytesIO(row["image"])), scene)["all"]
        assert list(json.loads(row["captions"]).values()) == scene_language.captions(scene)
    rows = pq.read_table(tmp_path / "scenes/edit/00000.parquet").to_pylist()
    for row in rows:
        scenes = json.loads(row["scene"])
        assert (
            len(row["image_list"])
            == len(row["caption_list"])
            == len(row["instruction_list"]) + 1
            == len(scenes)
        )
        assert all(
            score(Image.open(io.BytesIO(data)), scene)["all"]
            for data, scene in zip(row["image_list"], scenes)
        )
    lines = [
        json.loads(line)
        for line in (tmp_path / "scenes/vlm/conversations.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 10
    for line in lines:
        assert score(Image.open(tmp_path / "scenes/vlm/images" / line["image"]), line["scene"])[
            "all"
        ]
        assert sum(turn["value"].count("<image>") for turn in line["conversations"]) == 1


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    for name, settings in (("a", SMALL), ("b", SMALL), ("c", ScenesSettings(rows=40, seed=1))):
        write(settings, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (
        contents(tmp_path / "a")["t2i/00000.parquet"]
        != contents(tmp_path / "c")["t2i/00000.parquet"]
    )


def test_several_writers_at_once_leave_one_complete_folder_and_no_remains(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: ensure(SMALL, tmp_path / "root"), range(4)))
    assert len(folders) == 1 and list((tmp_path / "root").iterdir()) == list(folders)
    write(SMALL, tmp_path / "alone")
    assert contents(folders.pop()) == contents(tmp_path / "alone")


def test_a_writer_that_dies_leaves_no_folder(tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "_write_conversations", die)
    with pytest.raises(KeyboardInterrupt):
        ensure(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ensure_draws_once_and_anew_for_other_settings(tmp_path):
    folder = ensure(SMALL, tmp_path)
    (folder / "mark").touch()
    assert ensure(ScenesSettings(rows=40), tmp_path) == folder and (folder / "mark").exists()
    assert ensure(ScenesSettings(rows=41), tmp_path) != folder


def test_a_root_that_cannot_be_written_is_a_settings_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be drawn into"):
        ensure(SMALL, tmp_path / "file")


def test_kinds_of_weight_zero_are_not_drawn_and_unknown_ones_are_refused(tmp_path):
    settings = build(ScenesSettings, {"kinds": {"one": 1, "pair": 0}})
    assert {scene["kind"] for _, scene in prompts(settings, 50)} == {"one"}
    for kinds, key in (
        ({"two": 1}, "kinds.two"),
        ({"one": -1}, "kinds.one"),
        ({"one": 0}, "kinds"),
    ):
        with pytest.raises(SettingsError) as caught:
            build(ScenesSettings, {"kinds": kinds}, "scenes")
        assert caught.value.key == f"scenes.{key}"


def test_prompts_are_fixed_and_name_all_that_is_judged():
    assert prompts(ScenesSettings(), 12) == prompts(ScenesSettings(), 12)
    for prompt, scene in prompts(ScenesSettings(), 40):
        assert scene["kind"] == "count" or any(
            word in prompt
            for word in ("center", "left", "right", "top", "bottom", "above", "below")
        )
        assert all(f"{thing['colour']} {thing['shape']}" in prompt for thing in scene["objects"])
    rng = np.random.default_rng(1)
    for _ in range(12):
        scenes, instructions = edit_sequence(ScenesSettings(), rng)
        assert instructions[0][0] and not score(draw(scenes[0], 32), scenes[1])["all"]
