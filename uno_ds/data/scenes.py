"""The embedded data set: scenes of coloured shapes, written in the layouts of real data and read
through the same path."""

import copy
import hashlib
import io
import json
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from uno_ds.data import scene_language as language
from uno_ds.data.scene_drawing import (
    COLOURS,
    KINDS,
    OPPOSITE,
    SHAPES,
    Scene,
    draw,
    make_scene,
    relations_of,
)
from uno_ds.data.scene_negatives import another, wrong_captions
from uno_ds.settings import SettingsError, setting, to_plain

FORMAT = 3  # raise it when the drawing or the sentences change: an older folder is then drawn anew
SETS = ("t2i", "edit", "vlm")
# What is drawn where a recipe does not say otherwise.
USUAL_KINDS = ("one", "count", "pair")
ROWS_PER_GROUP = 500
MOST_DRAWS = 100_000


@dataclass(frozen=True)
class ScenesSettings:
    size: int = setting(32, minimum=16, maximum=1024, doc="Side of the drawn scenes in pixels.")
    rows: int = setting(
        4000,
        minimum=1,
        doc="Scenes in the text-to-image and in the editing set; the conversation set has a "
        "quarter, unless `vlm_rows` says otherwise.",
        maximum=10**7,
    )
    seed: int = setting(
        0,
        minimum=0,
        doc="Seed of the drawn scenes; the same seed gives the same files.",
        maximum=2**63 - 1,
    )
    kinds: dict[str, float] = setting(
        factory=lambda: {kind: 1.0 for kind in USUAL_KINDS},
        doc="Relative frequency of the kinds of scenes: one (a single object at a place), count "
        "(two or three equal objects), pair (two different objects and their relation), triple "
        "(three different objects, the first beside the second and above or below the third).",
        minimum=1e-9,
        maximum=1e6,
        or_zero=True,
    )
    vlm_kinds: dict[str, float] | None = setting(
        None,
        doc="`kinds` of the conversation set; null: those of the other sets.",
        minimum=1e-9,
        maximum=1e6,
        or_zero=True,
    )
    vlm_rows: int | None = setting(
        None,
        minimum=1,
        maximum=10**7,
        doc="Scenes in the conversation set; null: a quarter of `rows`.",
    )
    held_out: float = setting(
        0.0,
        minimum=0,
        below=1,
        doc="Share of contents (kind, colours, shapes, relations, place) that no drawn scene has, "
        "chosen by a hash of the content: prompts of `python -m benchmarks gain` are of these.",
    )

    def __post_init__(self) -> None:
        _check_kinds("kinds", self.kinds)
        if self.vlm_kinds is not None:
            _check_kinds("vlm_kinds", self.vlm_kinds)

    def of_set(self, name: str) -> "ScenesSettings":
        """With the kinds and the rows of one of SETS as `kinds` and `rows`."""
        if name != "vlm":
            return self
        rows = max(1, self.rows // 4) if self.vlm_rows is None else self.vlm_rows
        return replace(self, kinds=self.vlm_kinds or self.kinds, rows=rows)


def _check_kinds(key: str, kinds: dict[str, float]) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise SettingsError(
                f"{key}.{kind}", f"unknown kind of scene; allowed are {', '.join(KINDS)}."
            )
    if not sum(kinds.values()) > 0:
        raise SettingsError(key, "all frequencies are 0; at least one kind of scene must be drawn.")


# Left out of the name of a folder while they have these values, so that folders of earlier versions
# keep their names.
_NEWER_KEYS = {"vlm_kinds": None, "vlm_rows": None, "held_out": 0.0}


def _identity(settings: ScenesSettings) -> str:
    plain = to_plain(settings)
    for key, value in _NEWER_KEYS.items():
        if plain[key] == value:
            del plain[key]
    return json.dumps([FORMAT, plain], sort_keys=True)


def ensure(settings: ScenesSettings, root: str | Path) -> Path:
    """Folder below `root` with the three sets of these settings; drawn only if it is not there yet.

    Raises SettingsError if the folder cannot be written.
    """
    digest = hashlib.sha256(_identity(settings).encode()).hexdigest()
    folder = Path(root) / f"scenes-{digest[:12]}"
    if not folder.is_dir():
        try:
            write(settings, folder)
        except OSError as error:
            raise SettingsError(
                "scenes", f"cannot be drawn into '{folder}': {error.strerror or error}."
            ) from None
    return folder


def write(settings: ScenesSettings, folder: str | Path) -> None:
    """Draws the three sets into a partial folder and renames it: `folder` is complete or absent.

    Any number of processes may do so at once; the first to finish wins, and all of them have drawn
    the same files."""
    folder = Path(folder)
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        for name in ("t2i", "edit", "vlm/images"):
            (partial / name).mkdir(parents=True)
        _write_text_to_image(settings, partial / "t2i" / "00000.parquet")
        _write_edits(settings, partial / "edit" / "00000.parquet")
        _write_conversations(settings, partial / "vlm")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def prompts(
    settings: ScenesSettings, count: int, seed: int = 1, part: tuple[float, float] | None = None
) -> list[tuple[str, Scene]]:
    """A fixed list of prompts with what a picture of each must show (see `scene_score.score`).
    `part`: only contents whose `place_of_content` is at least the first number and below the
    second; None: all that the settings draw."""
    rng = np.random.default_rng([seed, len(SETS)])
    low, high = part or (settings.held_out, 1.0)
    chosen = [_draw_scene(settings, rng, low, high) for _ in range(count)]
    return [(language.captions(scene)[0], scene) for scene in chosen]


def content_of(scene: Scene) -> str:
    """What a picture of the scene shows, without sizes and positions: alike for two scenes of which
    the same pictures are right."""
    looks = sorted(language.name(thing) for thing in scene["objects"])
    relations = []
    for thing, relation, other in relations_of(scene):
        if relation in ("right", "below"):
            thing, relation, other = other, OPPOSITE[relation], thing
        relations.append(f"{language.name(thing)} {relation} {language.name(other)}")
    return ", ".join([scene["kind"], *looks, scene["place"] or "", *sorted(relations)])


def place_of_content(scene: Scene) -> float:
    """A number in [0, 1) by the content: those below `held_out` are held out."""
    digest = hashlib.sha256(content_of(scene).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _draw_scene(
    settings: ScenesSettings, rng: np.random.Generator, low: float, high: float = 1.0
) -> Scene:
    """A scene whose content has a place in [low, high). Raises SettingsError where none is found:
    so few contents of these kinds are there."""
    for _ in range(MOST_DRAWS):
        scene = make_scene(_pick_kind(settings, rng), rng)
        if low <= place_of_content(scene) < high:
            return scene
    raise SettingsError(
        "held_out",
        f"no scene of these kinds has a content between the shares {low:g} and {high:g} in "
        f"{MOST_DRAWS:,} draws; widen it, or give other kinds.",
    )


def edit(scene: Scene, rng: np.random.Generator) -> tuple[Scene, list[str]]:
    """A random change of a scene: the scene after it, and wordings of the instruction. A pair's
    objects stay different."""
    changed = copy.deepcopy(scene)
    things = changed["objects"]
    actions = ["recolour", "reshape"]
    if scene["kind"] == "pair":
        actions.append("remove")
    action = str(rng.choice(actions))
    which = int(rng.integers(len(things)))
    thing = scene["objects"][which]
    touched = things if scene["kind"] == "count" else [things[which]]
    if action == "remove":
        return _without(scene, which), language.remove_instructions(scene, thing)
    if action == "recolour":
        colour = another(COLOURS, [thing["colour"] for thing in things], rng)
        for item in touched:
            item["colour"] = colour
        return changed, language.recolour_instructions(scene, thing, colour)
    assert action == "reshape", action
    shape = another(SHAPES, [thing["shape"] for thing in things], rng)
    for item in touched:
        item["shape"] = shape
    return changed, language.reshape_instructions(scene, thing, shape)


def edit_sequence(
    settings: ScenesSettings, rng: np.random.Generator
) -> tuple[list[Scene], list[list[str]]]:
    """Two or three scenes, none of them held out, and wordings of the instructions that lead from
    each to the next."""
    for _ in range(MOST_DRAWS):
        scenes, instructions = _any_edit_sequence(settings, rng)
        if all(place_of_content(scene) >= settings.held_out for scene in scenes):
            return scenes, instructions
    raise SettingsError(
        "held_out", f"leaves no edit of these kinds in {MOST_DRAWS:,} draws; lower it."
    )


def _any_edit_sequence(
    settings: ScenesSettings, rng: np.random.Generator
) -> tuple[list[Scene], list[list[str]]]:
    scene = make_scene(_pick_kind(settings, rng), rng)
    scenes, instructions = [scene], []
    if scene["kind"] == "pair" and rng.random() < 0.25:
        added = int(rng.integers(2))
        scenes = [_without(scene, added), scene]
        instructions = [language.add_instructions(scene, added)]
    for _ in range(1 + int(rng.random() < 0.25) - len(instructions)):
        changed, wordings = edit(scenes[-1], rng)
        scenes.append(changed)
        instructions.append(wordings)
    return scenes, instructions


def _without(pair: Scene, removed: int) -> Scene:
    relation = pair["relation"] if removed == 1 else language.OPPOSITE[pair["relation"] or "left"]
    place = language.SIDE_OF_RELATION[relation or "left"]
    return Scene(
        kind="one",
        objects=[copy.deepcopy(pair["objects"][1 - removed])],
        place=place,
        relation=None,
    )


def _pick_kind(settings: ScenesSettings, rng: np.random.Generator) -> str:
    weights = np.array([settings.kinds.get(kind, 0.0) for kind in KINDS])
    return str(rng.choice(KINDS, p=weights / weights.sum()))


def _png(scene: Scene, settings: ScenesSettings) -> bytes:
    buffer = io.BytesIO()
    draw(scene, settings.size).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _write_text_to_image(settings: ScenesSettings, path: Path) -> None:
    rng = np.random.default_rng([settings.seed, SETS.index("t2i")])
    # Numbers of their own, so that the scenes do not depend on the negatives.
    wrong = np.random.default_rng([settings.seed, len(SETS) + 1])

    def is_not_held_out(scene: Scene) -> bool:
        return place_of_content(scene) >= settings.held_out

    rows = []
    for _ in range(settings.rows):
        scene = _draw_scene(settings, rng, settings.held_out)
        captions = {
            f"wording_{number}": caption
            for number, caption in enumerate(language.captions(scene), start=1)
        }
        rows.append(
            {
                "image": _png(scene, settings),
                "captions": json.dumps(captions),
                "negative_captions": wrong_captions(scene, wrong, is_not_held_out),
                "scene": json.dumps(scene),
            }
        )
    schema = pa.schema(
        [
            ("image", pa.binary()),
            ("captions", pa.string()),
            ("negative_captions", pa.list_(pa.string())),
            ("scene", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=ROWS_PER_GROUP)


def _write_edits(settings: ScenesSettings, path: Path) -> None:
    rng = np.random.default_rng([settings.seed, SETS.index("edit")])
    rows = []
    for _ in range(settings.rows):
        scenes, instructions = edit_sequence(settings, rng)
        rows.append(
            {
                "image_list": [_png(scene, settings) for scene in scenes],
                "instruction_list": instructions,
                "caption_list": [language.captions(scene) for scene in scenes],
                "scene": json.dumps(scenes),
            }
        )
    texts = pa.list_(pa.list_(pa.string()))
    schema = pa.schema(
        [
            ("image_list", pa.list_(pa.binary())),
            ("instruction_list", texts),
            ("caption_list", texts),
            ("scene", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=ROWS_PER_GROUP)


def _write_conversations(settings: ScenesSettings, folder: Path) -> None:
    rng = np.random.default_rng([settings.seed, SETS.index("vlm")])
    settings = settings.of_set("vlm")
    lines = []
    for row in range(settings.rows):
        scene = _draw_scene(settings, rng, settings.held_out)
        name = f"{row:06d}.png"
        (folder / "images" / name).write_bytes(_png(scene, settings))
        caption = str(rng.choice(language.captions(scene)))
        # Half of the pictures are answered by a caption with no question, as UNO's captions are
        # read from noised latents.
        if rng.random() < 0.5:
            asked = [("", caption)]
        else:
            asked = [("describe the picture.", caption), *language.questions(scene)]
        order = rng.permutation(len(asked))[: int(rng.integers(1, 4))]
        turns = []
        for place, index in enumerate(order):
            question, answer = asked[index]
            turns.append(
                {"from": "human", "value": question if place else f"<image>\n{question}".strip()}
            )
            turns.append({"from": "gpt", "value": answer})
        lines.append(json.dumps({"image": name, "conversations": turns, "scene": scene}))
    (folder / "conversations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
