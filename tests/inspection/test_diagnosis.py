"""Names, pooling, attributes and the four cells of the diagnosis, on values made by hand."""

import pytest
import torch

from uno_ds.commands.inspect_sources import names_of
from uno_ds.inspection.analysis import attributes
from uno_ds.inspection.collection import pool
from uno_ds.inspection.diagnosis import cell_of, read_prompts, table
from uno_ds.inspection.images import ImageSet
from uno_ds.settings import SettingsError


def test_names_of_checkpoints_say_which_is_which():
    paths = ["runs/a", "runs/b/checkpoints/step_10", "other/a", "runs/b/checkpoints/latest", "a"]
    assert names_of(paths) == ("a", "b step_10", "a (2)", "b", "a (3)")
    assert names_of(["models/encoder"]) == ("encoder (2)",)


def test_quarters_of_an_image_are_pooled_row_by_row():
    tokens = torch.arange(16.0).reshape(16, 1)
    assert pool(tokens, (4, 4)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_attributes_are_those_that_all_objects_share():
    thing = {"shape": "circle", "colour": "red"}
    pair = {"objects": [thing, thing | {"colour": "blue"}], "place": None, "relation": "left"}
    assert attributes(pair) == {"count": "2", "shape": "circle", "relation": "left"}
    assert attributes(None) == {}


RIGHT, WRONG = {"all": True}, {"all": False}


@pytest.mark.parametrize(
    ("drawn", "read", "cell"),
    [
        (RIGHT, RIGHT, ("drawn right", "read right")),
        (RIGHT, WRONG, ("drawn right", "read wrong")),
        (WRONG, WRONG, ("drawn wrong", "read right")),
        (WRONG, RIGHT, ("drawn wrong", "read wrong")),
    ],
)
def test_the_four_cells(drawn, read, cell):
    record = {"drawn": drawn, "read": read, "answers": []}
    assert cell_of(record, None) == cell
    # A judge's verdict overrules the program's.
    other = cell_of(record, not drawn["all"])
    assert other is not None and other[0] != cell[0]
    # Answers that are all as expected mean that what was asked for is seen.
    asked = record | {"answers": [["how many?", "Two", "two."]]}
    assert cell_of(asked, True) == ("drawn right", "read right")
    assert cell_of({"answers": []}, True) is None and cell_of({"answers": []}, None) is None
    assert table([cell, None])["cells"][", ".join(cell)] == 1
    assert table([cell, None])["not_judged"] == 1


def test_prompts_are_texts_or_objects_and_a_mistake_names_the_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        'a red cup.\n\n{"prompt": "two cups.", "questions": [["how many?", "two"]], '
        '"drawn_right": {"uno": true}}\n'
    )
    first, second = read_prompts(path)
    assert first.text == "a red cup." and first.verdict("uno") is None
    assert second.questions == (("how many?", "two"),) and second.verdict("uno") is True
    for line, fault in (
        ('{"prompt": ""}', "'prompt' must be a text"),
        ('{"prompt": "a", "questions": ["x"]}', "line 2"),
        ('{"prompt": "a", "drawn": 1}', "unknown key 'drawn'"),
        ('{"prompt": "a", "scene": {"kind": "one"}}', "line 2"),
        ('{"prompt": "a", "drawn_right": {"uno": 1}}', "'drawn_right' must map"),
        ("{", "line 2"),
    ):
        path.write_text(f"a cup.\n{line}\n")
        with pytest.raises(SettingsError, match="--prompts") as raised:
            read_prompts(path)
        assert fault in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [None, "beach", "[]", "{}", "3", '{"objects": 1}', 4.5])
def test_a_column_that_is_named_scene_need_not_hold_scenes(value):
    class Other:
        def value(self, row: int, column: str) -> object:
            return value

    images = ImageSet.__new__(ImageSet)
    images.source, images.rows = Other(), [0]
    assert images.scene(0) is None
