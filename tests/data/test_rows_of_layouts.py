"""Rows of every layout are read as meant, and each unusable one has its cause."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shaded_rows import CAPTIONS, cause, picture, read, shade_of, talk, write_lines
from small_runs import write_t2i

from uno_ds.data.layouts.conversation import Conversation
from uno_ds.data.layouts.edit import Edit
from uno_ds.data.layouts.text_to_image import TextToImage
from uno_ds.settings import SettingsError


def test_text_to_image_rows_over_several_files_in_the_order_of_their_names(tmp_path, open_source):
    for number in (1, 0):
        write_t2i(
            tmp_path / f"photos/t2i/{number:05d}.parquet",
            [{"image": picture(10 * number + row), "captions": CAPTIONS} for row in range(3)],
        )
    source = open_source(tmp_path / "photos/t2i")
    assert (len(source), source.layout, source.name, source.unreadable_files) == (
        6,
        "t2i",
        "photos/t2i",
        {},
    )
    assert [shade_of(read(source, row).image) for row in range(6)] == [0, 1, 2, 10, 11, 12]
    example = read(source, 4)
    assert isinstance(example, TextToImage) and example.key == "photos/t2i:4"
    assert example.captions == ["a cup", "a white cup.", "a cup on a table."]
    assert (
        len(open_source(tmp_path / "photos/*/00001.parquet"))
        == len(open_source(tmp_path / "photos/t2i/00001.parquet"))
        == 3
    )


def test_bad_rows_of_a_parquet_file_have_their_causes_and_spare_the_others(tmp_path, open_source):
    rows = [
        (picture(), CAPTIONS),
        (picture()[:60], CAPTIONS),
        (b"", CAPTIONS),
        (None, CAPTIONS),
        (picture(), '{"a": '),
        (picture(), "no json"),
        (picture(), '{"a": " ", "b": []}'),
        (picture(), None),
        (picture(), "3"),
        (picture(7), CAPTIONS),
    ]
    path = write_t2i(
        tmp_path / "a.parquet", [{"image": image, "captions": captions} for image, captions in rows]
    )
    source = open_source(path)
    assert [cause(source, row) for row in range(1, 9)] == [
        "undecodable_image",
        "empty_image",
        "missing_image",
        "bad_json",
        "bad_json",
        "no_caption",
        "no_caption",
        "bad_json",
    ]
    assert shade_of(read(source, 9).image) == 7 and shade_of(read(source, 0).image) == 100


@pytest.mark.parametrize(
    "column, value, expected",
    [
        ("caption", " a cup ", ["a cup"]),
        ("text", "a cup", ["a cup"]),
        ("captions", ["a", "b", "a"], ["a", "b"]),
        ("caption", ["a", "", "b"], ["a", "b"]),
    ],
)
def test_plain_caption_columns_and_image_structs_are_accepted(
    tmp_path, open_source, column, value, expected
):
    rows = [{"image": {"bytes": picture(33), "path": None}, column: value}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    example = read(open_source(tmp_path / "a.parquet"))
    assert example.captions == expected and shade_of(example.image) == 33


def test_an_image_feature_of_datasets_is_not_decoded_by_it(tmp_path, open_source):
    """A truncated image must be a bad row of ours, in a parquet and in an arrow file written by
    `datasets` itself."""
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict(
        {
            "image": [
                {"bytes": picture(44), "path": None},
                {"bytes": picture()[:50], "path": None},
            ],
            "caption": ["a", "b"],
        },
        features=features,
    )
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        source = open_source(path)
        assert shade_of(read(source, 0).image) == 44 and cause(source, 1) == "undecodable_image"


def test_arrow_files_in_the_file_format_are_read(tmp_path, open_source):
    table = pa.table({"image": pa.array([picture(55)], pa.binary()), "captions": [CAPTIONS]})
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    assert shade_of(read(open_source(tmp_path / "a.arrow")).image) == 55


def test_edit_rows_give_neighbouring_images_with_the_instruction_between_them(
    tmp_path, open_source
):
    rows = [
        {
            "image_list": [picture(shade) for shade in (10, 20, 30)],
            "instruction_list": [["ten to twenty", " "], ["twenty to thirty"]],
            "caption_list": [["ten"], ["twenty"], ["thirty"]],
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source(tmp_path)
    seen = set()
    for seed in range(20):
        example = read(source, 0, seed)
        assert isinstance(example, Edit)
        seen.add(
            (
                shade_of(example.source),
                shade_of(example.target),
                *example.instructions,
                *example.captions,
            )
        )
        assert read(source, 0, seed).instructions == example.instructions
    assert seen == {(10, 20, "ten to twenty", "twenty"), (20, 30, "twenty to thirty", "thirty")}


def test_bad_edit_rows_have_their_causes_and_a_blank_step_is_never_chosen(tmp_path, open_source):
    pair = [picture(1), picture(2)]
    rows = [
        (pair, [["go"]]),
        (pair, [[" "]]),
        (pair, []),
        (pair, None),
        (pair[:1], [["go"]]),
        (None, [["go"]]),
        ([picture()[:50], picture()], [["go"]]),
        ([None, picture()], [["go"]]),
        ([*pair, picture(3)], [[], ["go"]]),
    ]
    schema = pa.schema(
        [
            ("image_list", pa.list_(pa.binary())),
            ("instruction_list", pa.list_(pa.list_(pa.string()))),
        ]
    )
    pq.write_table(
        pa.Table.from_pylist([dict(zip(schema.names, row)) for row in rows], schema=schema),
        tmp_path / "a.parquet",
    )
    source = open_source(tmp_path)
    assert read(source, 0).captions == []
    assert [cause(source, row) for row in range(1, 8)] == [
        *["missing_instruction"] * 3,
        *["missing_image"] * 2,
        "undecodable_image",
        "missing_image",
    ]
    assert {shade_of(read(source, 8, seed).source) for seed in range(8)} == {2}


def test_conversations_keep_the_order_of_texts_and_images(tmp_path, open_source):
    turns = talk("Look: <image> and <image>\nSame?") + talk("Sure?", "Yes.")
    lines = [
        {"image": ["a.png", "b.png"], "conversations": turns},
        "",
        {"conversations": talk("Hello?")},
        {"image": "a.png", "conversations": json.dumps(talk())},
    ]
    path = write_lines(tmp_path, lines, {"a.png": picture(1), "b.png": picture(2)})
    source = open_source(path)
    assert (len(source), source.layout) == (3, "vlm")
    example = read(source, 0)
    assert isinstance(example, Conversation) and [role for role, _ in example.turns] == [
        "human",
        "gpt",
        "human",
        "gpt",
    ]
    parts = [part if isinstance(part, str) else shade_of(part) for part in example.turns[0][1]]
    assert parts == ["Look:", 1, "and", 2, "Same?"] and example.turns[3][1] == ["Yes."]
    assert read(source, 1).turns == [("human", ["Hello?"]), ("gpt", ["A cup."])]
    assert read(source, 2).turns[1] == ("gpt", ["A cup."])


def test_bad_conversation_rows_have_their_causes_and_line_numbers_stay_right(tmp_path, open_source):
    lines = [
        "{broken",
        {"image": "missing.png", "conversations": talk()},
        {"image": "../secret.png", "conversations": talk()},
        {"image": ["a.png", "a.png"], "conversations": talk("one <image> of two")},
        {"conversations": talk()},
        {"image": "a.png", "conversations": []},
        {"image": "a.png", "conversations": talk(gpt=" ")},
        {"image": "a.png", "conversations": talk()[:1]},
        {"image": "a.png"},
        "[1, 2]",
        {"image": "a.png", "conversations": [{"from": "tool", "value": "<image>"}]},
        {"image": 5, "conversations": talk()},
        {"image": "a.png", "conversations": talk()},
    ]
    path = write_lines(tmp_path / "set", lines)
    (tmp_path / "set/secret.png").write_bytes(picture())
    source = open_source(path)
    assert [cause(source, row) for row in range(12)] == [
        "bad_json",
        "missing_image",
        "missing_image",
        "image_count",
        "image_count",
        "no_conversation",
        "missing_answer",
        "missing_answer",
        "no_conversation",
        "bad_json",
        "bad_turn",
        "missing_image",
    ]
    assert read(source, 12).key == f"{source.name}:12"


def test_images_are_looked_for_in_the_named_folder_or_beside_the_file(tmp_path, open_source):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.png").write_bytes(picture(3))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/x.png").write_bytes(picture(4))
    line = json.dumps({"image": "x.png", "conversations": talk()})
    for name in ("flat", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "rows.jsonl").write_text(line)
    assert shade_of(read(open_source(tmp_path / "flat")).turns[0][1][0]) == 4
    assert (
        shade_of(
            read(open_source(tmp_path / "other", images=str(tmp_path / "elsewhere"))).turns[0][1][0]
        )
        == 3
    )
    with pytest.raises(SettingsError, match="does not exist"):
        open_source(tmp_path / "other", images=str(tmp_path / "nowhere"))
