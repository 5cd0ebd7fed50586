"""Texts of a row: captions, instructions and turns are those that were meant, in whatever form they
are given."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from shaded_rows import cause, picture, read, shade_of, shaded_turns, talk, write_lines
from small_runs import t2i_row, tree, write_rows, write_t2i

from uno_ds.commands.train import main
from uno_ds.data.captions import CaptionReader
from uno_ds.data.images import BadRow
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.run import prepare
from uno_ds.settings import SettingsError, build


def opened(path: Path, **values) -> Source:
    return Source(build(SourceSettings, {"path": str(path), **values}), cache=path.parent / "cache")


@pytest.mark.parametrize("column", ["caption", "text"])
@pytest.mark.parametrize(
    "value, expected",
    [
        ('["a cup", "a white cup", "a cup"]', ["a cup", "a white cup"]),
        (' {"short": "a cup", "long": ["a white cup", " "]}', ["a cup", "a white cup"]),
        ('["a cup", [17, 4], 3.5, null, true]', ["a cup"]),
        # Texts that only look a little like JSON are captions as they stand.
        ("[a cup] on a table", ["[a cup] on a table"]),
        ("{cup}", ["{cup}"]),
        ("3", ["3"]),
        ('"a cup"', ['"a cup"']),
    ],
)
def test_a_caption_that_is_json_of_a_list_or_object_is_read_as_one(
    tmp_path, column, value, expected
):
    source = opened(write_rows(tmp_path / "a.parquet", [{"image": picture(), column: value}]))
    assert read(source).captions == expected


@pytest.mark.parametrize("value", ['["a cup", "a wh', '{"a": "a cup"', "['a cup', 'a white cup']"])
def test_a_caption_that_breaks_off_as_json_is_a_bad_row(tmp_path, value):
    source = opened(write_rows(tmp_path / "a.parquet", [{"image": picture(), "caption": value}]))
    assert cause(source) == "bad_json"


METADATA = {
    "short": "a cup",
    "model": "Qwen2.5-VL-7B",
    "Lang": "en",
    "tokens": ["a", "cup"],
    "token_ids": [17, 4],
    "score": 0.31,
    "long": "a white cup on a table",
}


@pytest.mark.parametrize("form", ["json", "struct"])
def test_metadata_beside_the_captions_is_left_out_and_named(tmp_path, form):
    value = json.dumps(METADATA) if form == "json" else METADATA
    source = opened(write_rows(tmp_path / "a.parquet", [{"image": picture(), "captions": value}]))
    assert read(source).captions == ["a cup", "a white cup on a table"]
    assert source.left_out_keys == ["Lang", "model", "tokens"]


def test_a_source_chooses_the_keys_of_its_captions(tmp_path):
    path = write_rows(
        tmp_path / "a.parquet",
        [
            {"image": picture(), "captions": json.dumps({"model": "a", "by": {"model": "b"}})},
            {"image": picture(), "captions": json.dumps({"by": "c"})},
            {"image": picture(), "captions": json.dumps(["d"])},
        ],
    )
    source = opened(path, caption_keys=["model"])
    assert read(source, 0).captions == ["a"] and read(source, 2).captions == ["d"]
    assert source.left_out_keys == []
    with pytest.raises(BadRow, match="has the keys by, and caption_keys are model"):
        read(source, 1)
    both = opened(path, caption_keys=["model", "by"])
    assert [read(both, row).captions for row in (0, 1)] == [["a", "b"], ["c"]]
    with pytest.raises(SettingsError, match="caption_keys: must name at least one key"):
        build(SourceSettings, {"path": "x", "caption_keys": []})


def test_the_pairs_of_an_arrow_map_are_an_object():
    schema = pa.schema([("captions", pa.map_(pa.string(), pa.string()))])
    rows = [{"captions": [("short", "a cup"), ("model", "x")]}]
    (row,) = pa.Table.from_pylist(rows, schema=schema).to_pylist()
    assert CaptionReader().texts(row["captions"]) == ["a cup"]


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize(
    "value, first",
    [
        ("make it red", ["make it red"]),
        (
            json.dumps([["make it red", "paint it red"], ["turn it"]]),
            ["make it red", "paint it red"],
        ),
        (json.dumps({"a": "make it red", "model": "x", "n": 3}), ["make it red"]),
        (json.dumps([{"a": "make it red", "lang": "en"}, ["turn it"]]), ["make it red"]),
    ],
)
def test_instructions_that_are_json_are_read_like_the_list_they_hold(tmp_path, value, first, pairs):
    row = {"image_list": [picture(n) for n in range(pairs + 1)], "instruction_list": value}
    row["caption_list"] = json.dumps([["zero"], ["one", 5], ["two"]])
    source = opened(write_rows(tmp_path / "a.parquet", [row]))
    sequence = source.read_whole(0)
    assert sequence.instructions[0] == first
    assert sequence.captions == [["one"], ["two"]][:pairs]


def test_json_of_several_strings_for_one_pair_are_wordings_and_for_more_pairs_one_each(tmp_path):
    value = json.dumps(["make it red", "turn it"])
    rows = [
        {"image_list": [picture(n) for n in range(images)], "instruction_list": value}
        for images in (2, 3)
    ]
    source = opened(write_rows(tmp_path / "a.parquet", rows))
    assert source.read_whole(0).instructions == [["make it red", "turn it"]]
    assert source.read_whole(1).instructions == [["make it red"], ["turn it"]]


def test_images_without_a_mark_come_first_and_a_system_turn_before_them(tmp_path):
    lines = [
        {"image": "a.png", "conversations": talk("What is it?")},
        {"image": ["a.png", "b.png"], "conversations": talk("Same?", system="Be brief.")},
        {"image": "a.png", "conversations": talk("It is <image>", system="Be brief.")},
        {"conversations": talk("Hello?", system=" ")},
        {"image": "a.png", "conversations": [{"role": "assistant", "content": "A cup."}]},
    ]
    source = opened(write_lines(tmp_path, lines, {"a.png": picture(1), "b.png": picture(2)}))
    answer, system = ("gpt", ["A cup."]), ("human", ["Be brief."])
    assert shaded_turns(read(source, 0)) == [("human", [1, "What is it?"]), answer]
    assert shaded_turns(read(source, 1)) == [system, ("human", [1, 2, "Same?"]), answer]
    assert shaded_turns(read(source, 2)) == [system, ("human", ["It is", 1]), answer]
    assert shaded_turns(read(source, 3)) == [("human", []), ("human", ["Hello?"]), answer]
    assert shaded_turns(read(source, 4)) == [("gpt", [1, "A cup."])]


@pytest.mark.parametrize(
    "images, human", [(["a.png"] * 2, "<image>"), ([], "<image>"), (["a.png"], "<image> <image>")]
)
def test_marks_that_fit_no_number_of_images_are_a_bad_row_with_both_numbers(
    tmp_path, images, human
):
    source = opened(
        write_lines(
            tmp_path, [{"image": images, "conversations": talk(human)}], {"a.png": picture()}
        )
    )
    with pytest.raises(BadRow, match=rf"{human.count('<')} <image> marks for {len(images)} images"):
        read(source)


def test_names_may_begin_with_the_folder_of_images(tmp_path):
    names = ["a.png", "images/a.png", "./images/a.png", "images/b.png", "images/../../c.png"]
    lines = [{"image": name, "conversations": talk("<image>")} for name in names]
    path = write_lines(tmp_path / "set", lines, {"a.png": picture(1)})
    # A folder that really holds another of its name comes first.
    (tmp_path / "set/images/images").mkdir()
    (tmp_path / "set/images/images/b.png").write_bytes(picture(2))
    (tmp_path / "set/b.png").write_bytes(picture(3))
    (tmp_path / "c.png").write_bytes(picture(4))
    source = opened(path)
    shades = [shade_of(read(source, row).turns[0][1][0]) for row in range(4)]
    assert shades == [1, 1, 1, 2] and cause(source, 4) == "missing_image"


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path):
    """In a json lines file, and in the text of a webdataset archive."""
    path = write_lines(tmp_path, [{"conversations": talk("Hello?")}] * 2, {})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert shaded_turns(read(opened(path)))[0] == ("human", ["Hello?"])
    members = {"0.png": picture(), "0.txt": b"\xef\xbb\xbfa cup"}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    assert read(opened(tmp_path / "a.tar")).captions == ["a cup"]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    row = t2i_row() | {"captions": json.dumps({"short": "a cup", "model": "Q", "lang": "en"})}
    write_t2i(tmp_path / "t2i/a.parquet", [row])
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(tree(tmp_path, [tmp_path / "t2i"])))
    return path


def test_keys_that_are_left_out_are_named_at_the_start_and_in_a_dry_run(recipe, capsys):
    prepare(str(recipe))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "caption_keys" in line]
    assert line.startswith("warning: data.sources.0.caption_keys: source") and "lang, model" in line
    assert main(["--dry-run", "--recipe", str(recipe)]) == 0
    assert line in capsys.readouterr().out.splitlines()
    chosen = ["data.sources.0.caption_keys=[short, lang]"]
    run = prepare(str(recipe), chosen)
    assert read(run.sources[0]).captions == ["a cup", "en"]
    assert "caption_keys" not in capsys.readouterr().out
