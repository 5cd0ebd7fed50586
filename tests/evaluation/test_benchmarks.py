"""The arithmetic of each benchmark against tables computed by hand, and what is refused in its
files."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_files import DPG_HEADER, UNIGEN_SCRIPT, WRITERS, _csv
from PIL import Image

from uno_ds.evaluation.benchmark import Picture
from uno_ds.evaluation.benchmarks import BENCHMARKS
from uno_ds.evaluation.benchmarks.dpg import after_dependencies
from uno_ds.evaluation.benchmarks.gedit import two_scores
from uno_ds.evaluation.benchmarks.geneval2 import soft_tifa, spellings
from uno_ds.evaluation.benchmarks.imgedit import three_scores
from uno_ds.evaluation.benchmarks.kris import _frames, _Scores
from uno_ds.evaluation.benchmarks.unigenbench import _Scores as UniGenScores
from uno_ds.evaluation.benchmarks.unigenbench import dimension_of
from uno_ds.evaluation.detection import Found, confident, is_right, relations
from uno_ds.evaluation.items import Item, seed_of
from uno_ds.evaluation.judge import Reply
from uno_ds.evaluation.judged import fill, read_judge_texts, yes_or_no
from uno_ds.evaluation.published import published_rows
from uno_ds.evaluation.table import Row, Table
from uno_ds.settings import SettingsError


def overall(name: str, rows: list[Row]) -> float:
    return float(Table(rows, BENCHMARKS[name].headlines(rows)).means()[0][0])


def test_soft_tifa_by_hand():
    mean, geometric = soft_tifa([0.9, 0.4, 1.0])
    assert mean == pytest.approx(2.3 / 3) and geometric == pytest.approx(0.36 ** (1 / 3))
    assert soft_tifa([1.0, 0.0])[1] < 1e-5
    item = Item("a", "p", "3 atoms", {"pairs": [["q", "Yes"]] * 2, "skills": ["x", "y"]})
    row = BENCHMARKS["geneval2"].row(item, [{"0": 0.5, "1": 0.25}])
    assert row.values["AM"] == (37.5, 1) and row.values["AM, y"] == (25.0, 1)
    assert row.values["GM"][0] == pytest.approx(100 * math.sqrt(0.125))


def test_spellings_of_answers():
    assert spellings("two") == {"two", "Two", "2", " two", " Two", " 2"}
    assert spellings("Yes") == {"yes", "Yes", " yes", " Yes"}


def test_children_of_a_failed_parent_count_zero():
    graph = {
        1: {"parents": []},
        2: {"parents": [1]},
        3: {"parents": [2]},
        4: {"parents": [1, 2]},
        5: {"parents": []},
    }

    def scores(*answers: bool) -> list[float]:
        return list(after_dependencies(graph, dict(enumerate(answers, start=1))).values())

    assert scores(True, True, True, True, False) == [1, 1, 1, 1, 0]
    assert scores(False, True, True, True, True) == [0, 0, 0, 0, 1]
    assert scores(True, False, True, True, True) == [1, 0, 0, 0, 1]


def test_dpg_counts_its_first_row_and_all_pictures(tmp_path):
    """The official script leaves out the first row, and takes categories from the last picture."""
    items = BENCHMARKS["dpg"].items(WRITERS["dpg"](tmp_path), "")
    assert [len(item.facts["graph"]) for item in items] == [4, 3, 3]
    assert items[0].prompt == 'A cup, "number 0", on a table.'
    right = {"1": True, "2": True, "3": True, "4": True}
    wrong = right | {"1": False}
    row = BENCHMARKS["dpg"].row(items[0], [right, right, wrong, right])
    # Of the wrong picture the fourth question alone holds, which has no parent.
    assert row.values == {"overall": (325.0, 4), "entity": (700.0, 8), "attribute": (600.0, 8)}


def test_a_prompt_of_parti_keeps_the_quotes_that_it_begins_with(tmp_path):
    """The file is not quoted: one of its prompts begins with a word in quotes."""
    path = tmp_path / "PartiPrompts.tsv"
    prompts = ['"H O" on a wall', 'a cup that says "tea"']
    lines = ["Prompt\tCategory\tChallenge\tNote"]
    lines += [f"{prompt}\tFood\tBasic\t" for prompt in prompts]
    path.write_text("\n".join(lines) + "\n")
    assert [item.prompt for item in BENCHMARKS["parti"].items(path, "")] == prompts


# Style, world knowledge, attribute, action, relation, logic, grammar, compound, layout and text of
# BAGEL. The first row is of the leaderboard as arXiv 2510.06308, table 5, quotes it; the others are
# of arXiv 2510.18701, tables 2 to 5.
UNIGENBENCH_COLUMNS = {
    ("en", 61.53): [90.20, 85.60, 67.74, 61.98, 70.69, 30.23, 66.44, 58.12, 76.49, 7.76],
    ("en", 59.91): [90.08, 85.42, 67.73, 62.14, 70.64, 23.85, 65.85, 56.86, 76.56, 0.00],
    ("zh", 65.69): [92.30, 86.71, 75.21, 65.78, 75.38, 37.95, 69.52, 69.85, 77.61, 6.61],
    ("en_long", 71.26): [92.44, 89.31, 84.21, 67.62, 75.70, 59.71, 74.75, 74.71, 81.90, 12.23],
    ("zh_long", 75.75): [96.10, 89.02, 88.25, 72.43, 81.52, 68.69, 81.09, 82.05, 83.97, 14.40],
}


@pytest.mark.parametrize(("variant", "published"), UNIGENBENCH_COLUMNS)
def test_the_overall_of_unigenbench_is_the_mean_of_ten_dimensions(variant, published):
    """The published columns have the published mean, up to their rounding. Here they are over
    unequal numbers of points: a mean over points would be another number."""
    shares = UNIGENBENCH_COLUMNS[variant, published]
    rows = [
        Row(str(place), {f"dimension {place}": (count * share, count)})
        for place, (share, count) in enumerate(zip(shares, range(1, 11), strict=True))
    ]
    assert abs(overall("unigenbench", rows) - published) < 0.0101
    pooled = sum(count * share for share, count in zip(shares, range(1, 11), strict=True)) / 55
    assert abs(pooled - published) > 1
    known = [row.value for row in published_rows("unigenbench", variant) if row.model == "BAGEL"]
    assert published in known


def test_the_names_of_the_dimensions_of_unigenbench():
    assert dimension_of("Entity Layout - Two-Dimensional Space") == "Entity Layout"
    assert dimension_of("Style") == "Style"


def test_the_test_points_of_unigenbench_have_ten_dimensions():
    """By the names of the published files, of which two are of one dimension."""
    points = ["Style", "World Knowledge", "Attribute - Color", "Attribute - Quantity"]
    points += ["Action - Non-contact Interaction", "Relationship - Comparison"]
    points += ["Compound - Imagination", "Grammar - Negation", "Logical Reasoning"]
    points += ["Entity Layout - Two-Dimensional Space", "Text Generation"]
    unigenbench = BENCHMARKS["unigenbench"]
    item = Item("0", "p", "", {"points": points})
    all_hold, one_holds = [1] * 11, [1] + [0] * 10
    row = unigenbench.row(item, [{"points": all_hold}, {"points": one_holds}])
    (dimensions,) = unigenbench.headlines([row]).values()
    assert len(dimensions) == 10 and {"Action", "Entity Layout"} <= set(dimensions)
    assert row.values["Attribute"] == (200.0, 4) and row.values["Style"] == (200.0, 2)
    assert overall("unigenbench", [row]) == pytest.approx((100 + 9 * 50) / 10)


def test_unigenbench_answers():
    reads = UniGenScores(2)
    assert reads(Reply("<analysis>[]</analysis> <score> [1, 0]\n</score>")) == [1, 0]
    for text in ("", "<score>[1]</score>", "<score>[1, 2]</score>", "<score>1, x</score>"):
        with pytest.raises(ValueError):
            reads(Reply(text))


def test_gedit_by_hand():
    """Two groups of unequal size: per image, then per group, then over groups."""
    values = [("a", [9, 4], [8, 9]), ("a", [0, 9], [8, 8]), ("b", [6, 6], [6, 7])]
    rows = [
        BENCHMARKS["gedit"].row(Item(str(place), "p", group), [{"SC": consistency, "PQ": quality}])
        for place, (group, consistency, quality) in enumerate(values)
    ]
    assert overall("gedit", rows) == pytest.approx((math.sqrt(32) / 2 + 6) / 2)
    table = Table(rows, BENCHMARKS["gedit"].headlines(rows))
    assert table.means()[0][1:3].tolist() == pytest.approx([(2 + 6) / 2, (8 + 6) / 2])
    assert two_scores(Reply('{"a": 1} {"score": [1, 2.5]}')) == [1, 2.5]
    # Quotes that are not escaped, which no JSON parser takes.
    assert two_scores(Reply('{"reasoning": "a "red" {cup}", "score" : [7, 8]}')) == [7, 8]
    assert two_scores(Reply("{'score': [6, 0], 'reasoning': 'it's gone'}")) == [6, 0]
    for text in ('{"score": [1]}', '{"score": [1, 11]}', '{"score": "x"}', "8 and 9"):
        with pytest.raises(ValueError):
            two_scores(Reply(text))


def test_gedit_asks_as_its_scorer_does(tmp_path):
    """The text first, then the source and the edit; of quality, the edit alone."""
    data = WRITERS["gedit"](tmp_path)
    gedit = BENCHMARKS["gedit"]
    texts = read_judge_texts(data / "vie_prompts.py")
    item = gedit.items(data, "en")[0]
    drawn, source = tmp_path / "key0.png", tmp_path / "key0_SRCIMG.png"
    source.write_bytes(b"")
    asked = {
        question.key: question.parts for question in gedit.questions(item, drawn, texts, "en", 0)
    }
    rules = 'You judge. Answer { "score": [] }\nTwo pictures.\nHow well was this done: make it 0'
    assert asked["SC"] == (rules, Picture(source), Picture(drawn))
    assert asked["PQ"][0].endswith("How good does it look?") and asked["PQ"][1:] == (
        Picture(drawn),
    )


def test_imgedit_is_a_mean_of_means_per_type():
    scores = [("add", [5, 5, 5]), ("add", [2, 2, 2]), ("add", [2, 2, 2]), ("style", [4, 3, 2])]
    rows = [
        BENCHMARKS["imgedit"].row(Item(str(place), "p", kind), [{"scores": given}])
        for place, (kind, given) in enumerate(scores)
    ]
    assert overall("imgedit", rows) == pytest.approx((3 + 3) / 2)
    assert three_scores(Reply("Reasoning: 2 things\nA: 5\n**B**: 4\n- C: 1.")) == [5, 4, 1]
    for text in ("A: 5\nB: 4", "A: 5\nB: 4\nC: 6", "5 4 3", ""):
        with pytest.raises(ValueError):
            three_scores(Reply(text))


def test_kris_is_the_mean_of_all_normalised_scores():
    kris = BENCHMARKS["kris"]
    plain = {"consistency": {"consistency": 5}, "instruction": {"instruction": 1}}
    known = {"instruction": {"instruction": 2, "knowledge": 3}, "quality": {"quality": 4}}
    rows = [kris.row(Item("a", "p", "x"), [plain]), kris.row(Item("b", "p", "y"), [known])]
    assert overall("kris", rows) == pytest.approx((100 + 0 + 25 + 50 + 75) / 5)
    read = _Scores(["instruction", "knowledge"])
    text = 'So {"instruction_score": "4", "knowledge_score": 2}'
    assert read(Reply(text)) == {"instruction": 4, "knowledge": 2}
    assert read(Reply("Instruction score: 3\nknowledge_score = 5")) == {
        "instruction": 3,
        "knowledge": 5,
    }
    for text in ("good", '{"instruction_score": 9, "knowledge_score": 2}'):
        with pytest.raises(ValueError):
            read(Reply(text))


def test_kris_asks_with_the_instruction_of_the_data_and_of_corrected_anomalies_as_of_others(
    tmp_path,
):
    """The official scripts read `instruction`, which the data do not have, and have a prompt for
    anomalies that they never use."""
    data = WRITERS["kris"](tmp_path)
    kris = BENCHMARKS["kris"]
    texts = read_judge_texts(data / "prompts.py")
    items = {item.group: item for item in kris.items(data, "")}
    items["anomaly_correction"] = replace(items["color_change"], group="anomaly_correction")
    asked = {
        group: {
            question.key: question.parts[0]
            for question in kris.questions(item, tmp_path / "drawn.jpg", texts, "", 0)
        }
        for group, item in items.items()
    }
    assert asked["anomaly_correction"] == asked["color_change"]
    assert asked["color_change"]["instruction"] == "Is it done? make it blue"
    dual = "Is it done, and right? let it boil since heat"
    assert asked["practical_knowledge"]["instruction"] == dual
    assert asked["viewpoint_change"]["instruction"] == "Is it done? turn back"


def test_kris_names_its_pictures_as_the_script_of_each_category(tmp_path):
    data = WRITERS["kris"](tmp_path)
    kris = BENCHMARKS["kris"]
    texts = read_judge_texts(data / "prompts.py")
    drawn = tmp_path / "drawn.jpg"
    several = {"multi-element_composition", "temporal_prediction"}
    items = {item.group: item for item in kris.items(data, "")}
    assert several < set(items)
    for group, item in items.items():
        asked = {q.key: q.parts[1:] for q in kris.questions(item, drawn, texts, "", 0)}
        name = "This is the image to evaluate:" if group in several else "This is the edited image:"
        assert asked["quality"] == (name, Picture(drawn))
        if group not in several:
            source = ("This is the original image:", Picture(item.sources[0]))
            assert asked["consistency"] == (*source, "This is the edited image:", Picture(drawn))


def test_frames_are_shown_in_their_order():
    sources = (Path("3-1.jpg"), Path("3-2.jpg"), Path("3-4.jpg"))
    number, parts = _frames(Item("a", "p", sources=sources), Path("drawn.jpg"))
    assert number == 3
    assert [part for part in parts if isinstance(part, str)] == [
        "Frame 1 (Reference):",
        "Frame 2 (Reference):",
        "Frame 3 (Generated):",
        "Frame 4 (Reference):",
    ]


def box(left: float, top: float, side: float = 10, confidence: float = 0.95) -> Found:
    return Found((left, top, left + side, top + side), np.ones((1, 1), bool), confidence)


def test_the_rules_of_geneval():
    def colours(name: str, found: list[Found]) -> list[str]:
        return ["red" if thing.box[0] < 50 else "blue" for thing in found]

    objects = {"cup": [box(0, 0), box(60, 0)], "dog": [box(0, 60)]}

    def right(*include: dict, exclude: tuple = ()) -> bool:
        return is_right(objects, {"include": list(include), "exclude": list(exclude)}, colours)

    cup, dog = {"class": "cup", "count": 1}, {"class": "dog", "count": 1}
    assert right(cup, dog) and right({"class": "cup", "count": 2})
    assert not right({"class": "cup", "count": 3}) and not right({"class": "cat", "count": 1})
    assert not right(cup, exclude=({"class": "cup", "count": 2},))
    assert right(cup, exclude=({"class": "cup", "count": 3},))
    assert right(cup | {"color": "red"}) and not right(cup | {"color": "blue"})
    # Only as many objects as are asked for are looked at, the surest first.
    assert not right({"class": "cup", "count": 2, "color": "red"})
    assert right(cup, dog | {"position": ["below", 0]})
    assert not right(cup, dog | {"position": ["above", 0]})
    assert not right({"class": "cat", "count": 1}, dog | {"position": ["below", 0]})


def test_positions_and_thresholds_of_geneval():
    assert relations(box(0, 0), box(100, 0)) == {"left of"}
    assert relations(box(100, 100), box(0, 0)) == {"right of", "below"}
    # Nearer than a tenth of both sides: nowhere.
    assert relations(box(1, 0), box(0, 0)) == set()
    found = [("cup", box(0, 0, confidence=0.2)), ("cup", box(1, 0, confidence=0.5))]
    found += [("cup", box(number, 0, confidence=0.95)) for number in range(20)]
    assert len(confident(found, "colors")["cup"]) == 16
    assert (
        len(confident(found[:2], "colors")["cup"]) == 1 and confident(found[:2], "counting") == {}
    )


def test_the_overall_of_geneval_is_the_mean_of_the_kinds():
    geneval = BENCHMARKS["geneval"]
    rows = [
        geneval.row(Item("a", "p", "counting"), [True, False, False, False]),
        geneval.row(Item("b", "p", "colors"), [True, True, True, True]),
        geneval.row(Item("c", "p", "colors"), [True, True, False, False]),
    ]
    assert overall("geneval", rows) == pytest.approx((25 + 75) / 2)


def test_yes_and_no():
    assert yes_or_no(" **Yes**, it is.") and not yes_or_no("No.")
    for text in ("", "maybe", "nothing", "The answer is yes"):
        with pytest.raises(ValueError):
            yes_or_no(text)


def test_judge_prompts_are_read_from_a_script_that_is_not_run(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(UNIGEN_SCRIPT)
    texts = read_judge_texts(path)
    (template,) = [text for text in texts.templates if "{testpoint}" in text]
    text = fill(
        template, path, prompt="a {cup}", testpoint="['x']", explanation="E", test_explanation="T"
    )
    assert "<<a {cup}>> by ['x']. E T" in text and "with {braces}" in text
    assert texts.tables["explanation_dict"]["Style"] == "how it looks"
    with pytest.raises(SettingsError, match="'prompt.__class__' is not known"):
        fill("{prompt.__class__}", path, prompt="x")
    with pytest.raises(SettingsError, match="has no text 'nothing'"):
        texts.text("nothing")
    path.write_text("this is (no Python")
    with pytest.raises(SettingsError, match="--judge-prompts: .* is not a Python file"):
        read_judge_texts(path)


def test_seeds_depend_on_the_prompt_and_the_number(tmp_path):
    items = [Item("1", "a cup"), Item("2", "a dog"), Item("3", "a cup")]
    seeds = BENCHMARKS["dpg"].seeds(items)
    assert seeds[0] == [seed_of("a cup", number) for number in range(4)]
    assert seeds[2] == [seed_of("a cup", number) for number in range(4, 8)]
    assert BENCHMARKS["dpg"].seeds(items[1:])[0] == seeds[1]
    # An edit of another picture is another prompt, whatever comes before it.
    edits = [Item(name, "make it red", sources=(Path(f"{name}.jpg"),)) for name in ("1", "2")]
    first, second = BENCHMARKS["imgedit"].seeds(edits)
    assert first != second and BENCHMARKS["imgedit"].seeds(edits[1:]) == [second]
    scenes = BENCHMARKS["scenes"]
    assert scenes.seeds(scenes.items(Path(), "")[:3]) == [[0], [1], [2]]


def test_a_picture_of_a_scene_is_scored_by_program():
    scenes = BENCHMARKS["scenes"]
    row = scenes.row(scenes.first_items(1)[0], Image.new("RGB", (32, 32)))
    assert row.values["all"] == (0.0, 1.0) and f"all, {row.group}" in row.values


BROKEN = {
    "geneval": (
        '{"prompt": "x", "tag": "colors", "include": [{"class": "a"}]}',
        "'include' must be",
    ),
    "geneval2": ('{"prompt": "x", "vqa_list": []}', "'vqa_list' must be a list of"),
    "parti": ("Prompt\tCategory\nx\ty", "has no column Challenge"),
    "imgedit": (
        '{"1": {"id": "../x.jpg", "prompt": "p", "edit_type": "add"}}',
        "leaves the folder",
    ),
    "coco": ("\n\n", "holds no prompt"),
    "unigenbench": ("index,prompt_en,sub_dims_en\n1,x,{}\n", "row 2: the test points must be JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_named(name, tmp_path):
    text, message = BROKEN[name]
    path = tmp_path / "data.txt"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        BENCHMARKS[name].items(path, "en" if name == "unigenbench" else "")
    assert str(path) in str(caught.value)


def test_names_from_a_data_file_leave_no_folder(tmp_path):
    row = ["../../x", "text", "", 1, "0", "e", "e", "e", "q?"]
    path = _csv(tmp_path / "dpg_bench.csv", DPG_HEADER, [row])
    with pytest.raises(SettingsError, match="cannot name a file"):
        BENCHMARKS["dpg"].items(path, "")
    lines = [json.dumps({"prompt": "x", "tag": "t", "include": []})] * 2
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert len(BENCHMARKS["geneval"].items(tmp_path / "rows.jsonl", "")) == 2
