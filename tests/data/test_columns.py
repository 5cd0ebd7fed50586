"""Rows under the column names that public data sets use, and those that a source names: each is
read as what it is, or the error names the columns and the key."""

import json
from pathlib import Path

import pytest
from public_rows import archive, cause, lines, opened, parquet, read
from shaded_rows import picture, shade_of
from small_runs import tree, write_t2i

from uno_ds.commands.train import main
from uno_ds.data import known_columns
from uno_ds.data.columns import MOST_KEPT, ColumnReader
from uno_ds.data.images import BadRow
from uno_ds.data.prepared import PreparedSource, bad, write_shard
from uno_ds.data.source_checks import check_usable
from uno_ds.data.sources import SourceSettings
from uno_ds.settings import SettingsError, build

TEXT_TO_IMAGE = {
    "prompt": ({"image": picture(9), "prompt": "a cup"}, ["a cup"]),
    "txt": ({"jpg": picture(9), "txt": "a cup", "__key__": "0"}, ["a cup"]),
    "upper case": ({"Image": picture(9), "TEXT": "a cup", "URL": "x"}, ["a cup"]),
    "pixels": ({"pixel_values": {"bytes": picture(9), "path": None}, "text": "a"}, ["a"]),
    "img": ({"img": picture(9), "description": "a cup"}, ["a cup"]),
    "captions of other captioners": (
        {
            "image": picture(9),
            "caption": "a cup",
            "recaption": "a white cup",
            "caption_llava": ["a cup on a table"],
            "caption_score": "0.3",
            "num_caption": "3",
            "caption_model": "llava 7b",
            "negative_caption": "blurry",
        },
        ["a cup", "a cup on a table", "a white cup"],
    ),
    "numbered captions": (
        {"image": picture(9), "caption_0": "a cup", "caption_1": "a white cup"},
        ["a cup", "a white cup"],
    ),
    "sentences of COCO": (
        {
            "image": picture(9),
            "sentences": [
                {"tokens": ["a", "cup"], "raw": "A cup.", "imgid": 0, "sentid": 7},
                {"tokens": ["cup"], "raw": "The cup.", "imgid": 0, "sentid": 8},
            ],
            "filepath": "val2014",
        },
        ["A cup.", "The cup."],
    ),
}


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_text_to_image_rows_under_the_names_of_public_data(tmp_path, name):
    row, captions = TEXT_TO_IMAGE[name]
    source = opened(parquet(tmp_path / "a.parquet", row))
    example = read(source)
    assert source.layout == "t2i" and example.captions == captions
    assert shade_of(example.image) == 9


def test_a_source_names_its_columns_and_fields_of_structs(tmp_path):
    row = {"a": picture(1), "b": picture(2), "c": "a cup", "d": {"e": "a white cup", "f": "no"}}
    path = parquet(tmp_path / "a.parquet", row, {**row, "b": None})
    source = opened(path, columns={"image": ["b", "a"], "caption": ["c", "d.e"]})
    assert source.layout == "t2i" and read(source).captions == ["a cup", "a white cup"]
    assert [shade_of(read(source, index).image) for index in (0, 1)] == [2, 1]
    edit = opened(path, columns={"source": "a", "target": "b", "instruction": "c"})
    example = read(edit)
    assert edit.layout == "edit" and example.instructions == ["a cup"]
    assert (shade_of(example.source), shade_of(example.target)) == (1, 2)


# Columns of an edit, its instructions, and the captions of the edited image.
EDITS = {
    "InstructPix2Pix": (
        {
            "original_prompt": "a cup",
            "original_image": picture(1),
            "edit_prompt": "make it red",
            "edited_prompt": "a red cup",
            "edited_image": picture(2),
        },
        ["make it red"],
        ["a red cup"],
    ),
    "OmniEdit": (
        {
            "omni_edit_id": "task_0",
            "task": "swap",
            "src_img": picture(1),
            "edited_img": picture(2),
            "edited_prompt_list": ["make it red", "paint it red"],
            "width": 20,
        },
        ["make it red", "paint it red"],
        [],
    ),
    "CrispEdit": (
        {
            "input_img": {"bytes": picture(1), "path": "7_in.png"},
            "instruction": "red",
            "output_img": {"bytes": picture(2), "path": "7_out.png"},
            "type": "color",
        },
        ["red"],
        [],
    ),
    "MagicBrush": (
        {
            "source_img": picture(1),
            "mask_img": picture(3),
            "instruction": "red",
            "target_img": picture(2),
        },
        ["red"],
        [],
    ),
    "HQ-Edit": (
        {
            "input": "a cup",
            "input_image": picture(1),
            "edit": "make it red",
            "output": "a red cup",
            "output_image": picture(2),
        },
        ["make it red"],
        ["a red cup"],
    ),
    "short names": (
        {"input": picture(1), "output": picture(2), "instruction": "red"},
        ["red"],
        [],
    ),
    "text as the instruction": (
        {"source_image": picture(1), "target_image": picture(2), "text": "red"},
        ["red"],
        [],
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_as_pairs_of_images_under_the_names_of_public_data(tmp_path, name):
    row, instructions, captions = EDITS[name]
    source = opened(parquet(tmp_path / "a.parquet", row))
    example = read(source)
    assert source.layout == "edit"
    assert (example.instructions, example.captions) == (instructions, captions)
    assert (shade_of(example.source), shade_of(example.target)) == (1, 2)
    whole = source.read_whole(0)
    assert [shade_of(image) for image in whole.images] == [1, 2]


def test_pico_banana_rows_name_files_and_have_two_wordings(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "source/0.png").write_bytes(picture(1))
    (tmp_path / "images/1.png").write_bytes(picture(2))
    row = {
        "open_image_input_url": "https://images/0.png",
        "local_input_image": "source/0.png",
        "text": "Paint the cup in red.",
        "output_image": "images/1.png",
        "edit_type": "colour",
        "summarized_text": "Red cup.",
    }
    example = read(opened(lines(tmp_path / "sft.jsonl", row)))
    assert example.instructions == ["Paint the cup in red.", "Red cup."]
    assert (shade_of(example.source), shade_of(example.target)) == (1, 2)


def test_pico_banana_rows_without_a_source_on_this_machine_are_skipped(tmp_path):
    """The set's own script writes null for an image that it does not find."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(picture(2))
    row = {"local_input_image": None, "text": "Paint it.", "output_image": "images/1.png"}
    found = {**row, "local_input_image": "images/1.png"}
    source = opened(lines(tmp_path / "sft.jsonl", row, found))
    assert source.layout == "edit" and cause(source, 0) == "missing_image"
    assert read(source, 1).instructions == ["Paint it."]


def test_turns_whose_images_are_addresses_are_refused_with_the_columns_found(tmp_path):
    """pico-banana's rows of several turns."""
    files = [{"id": "original_input_image", "url": "https://images/0.jpg"}]
    row = {"files": files, "metadata_edit_turn_prompts": ["Paint it."]}
    with pytest.raises(
        SettingsError, match="its layout cannot be inferred from its columns .files"
    ):
        opened(lines(tmp_path / "multi-turn.jsonl", row))


def test_the_metadata_of_an_image_folder(tmp_path):
    for number in range(2):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / f"train/{number}.png").write_bytes(picture(number))
    rows = [{"file_name": f"train/{number}.png", "text": f"cup {number}"} for number in range(2)]
    source = opened(lines(tmp_path / "metadata.jsonl", *rows).parent)
    assert [read(source, row).captions for row in (0, 1)] == [["cup 0"], ["cup 1"]]
    assert [shade_of(read(source, row).image) for row in (0, 1)] == [0, 1]


def test_webdataset_rows_with_sidecars_and_with_several_images(tmp_path):
    sidecar = json.dumps({"prompt": "a cup", "width": 20, "status": "success"}).encode()
    source = opened(archive(tmp_path / "a.tar", {"0.jpg": picture(3), "0.json": sidecar}))
    assert read(source).captions == ["a cup"] and shade_of(read(source).image) == 3
    members = {
        "0.source.png": picture(1),
        "0.target.png": picture(2),
        "0.instruction.txt": b"make it red",
        "1.source.png": picture(3),
        "1.target.png": picture(4),
        "1.instruction.txt": b"turn it",
    }
    source = opened(archive(tmp_path / "pairs.tar", members))
    assert (len(source), source.layout) == (2, "edit")
    examples = [read(source, row) for row in (0, 1)]
    assert [shade_of(example.target) for example in examples] == [2, 4]
    assert [example.instructions for example in examples] == [["make it red"], ["turn it"]]
    named = opened(
        archive(tmp_path / "b.tar", {"0.jpg": picture(5), "0.txt": b"a cup", "0.json": sidecar}),
        columns={"image": "jpg", "caption": ["txt", "prompt"]},
    )
    assert read(named).captions == ["a cup"]
    (note,) = [line for line in [named.reading.line()] if "caption = txt, prompt" in line]
    assert "image = jpg" in note and "first text 'a cup'" in note


def test_columns_that_may_mean_the_same_are_an_error_that_shows_them_and_the_key(tmp_path):
    row = {"image": picture(), "prompt": "a", "description": "b"}
    path = parquet(tmp_path / "a.parquet", row)
    with pytest.raises(SettingsError) as caught:
        opened(path)
    assert str(caught.value) == (
        f"columns: source '{path.parent.name}/a' at '{path}': caption may be any of the columns "
        "prompt, description; choose with columns: {caption: prompt}."
    )
    assert read(opened(path, columns={"caption": "description"})).captions == ["b"]
    pair = {"source_image": picture(), "input_image": picture(), "edited_image": picture()}
    path = parquet(tmp_path / "b.parquet", {**pair, "edit_prompt": "a"})
    with pytest.raises(SettingsError, match="source may be any of the columns source_image, in"):
        opened(path)
    del pair["input_image"]
    path = parquet(tmp_path / "c.parquet", {**pair, "output_image": picture(), "edit": "a"})
    with pytest.raises(SettingsError, match="target may be any of the columns edited_image, out"):
        opened(path)


def test_a_row_whose_columns_are_ambiguous_among_others_is_a_bad_row(tmp_path):
    rows = [{"image": "a.png", "prompt": "a"}] * 30
    rows.append({"image": "a.png", "prompt": "a", "description": "b"})
    (tmp_path / "a.png").write_bytes(picture())
    source = opened(lines(tmp_path / "a.jsonl", *rows))
    assert read(source, 3).captions == ["a"] and cause(source, 30) == "ambiguous_columns"


def test_unknown_columns_are_refused_with_what_each_layout_needs(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"photo_a": picture(), "words": "a cup"})
    with pytest.raises(SettingsError) as caught:
        opened(path)
    assert "cannot be inferred from its columns (photo_a, words); name them with columns: {" in str(
        caught.value
    )
    assert "{source, target, instruction} for edit" in str(caught.value)
    source = opened(path, layout="t2i")
    with pytest.raises(SettingsError) as caught:
        check_usable(source, lambda example: None)
    assert "its columns are photo_a, words; t2i needs {image, captions} or {image, caption}" in str(
        caught.value
    )
    with pytest.raises(SettingsError) as caught:
        opened(path, columns={"image": "photo_b", "caption": "words"}, layout="t2i")
    assert "columns: source" in str(caught.value)
    assert "image is to be read from photo_b, and its columns are photo_a, words." in str(
        caught.value
    )
    with pytest.raises(SettingsError, match="columns: 'pixel' is nothing that a row holds; allo"):
        build(SourceSettings, {"path": "x", "columns": {"pixel": "a"}})
    with pytest.raises(SettingsError, match="columns: image must name at least one column"):
        build(SourceSettings, {"path": "x", "columns": {"image": []}})


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    parquet(tmp_path / "rows/a.parquet", *[{"jpg": picture(), "prompt": "a cup"}] * 3)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(tree(tmp_path, [tmp_path / "rows"])))
    return path


def test_what_was_recognised_is_a_line_at_the_start(recipe, capsys):
    assert main(["--dry-run", "--recipe", str(recipe)]) == 0
    printed = capsys.readouterr().out
    expected = "is read as 3 rows of layout t2i; image = jpg; caption = prompt; first text 'a cup'."
    assert expected in printed
    assert main(["--dry-run", "--json", "--recipe", str(recipe)]) == 0
    assert expected in " ".join(json.loads(capsys.readouterr().out)["notes"])


def test_a_prepared_folder_keeps_the_columns_it_was_made_from(tmp_path, monkeypatch):
    given = {"caption": ["c"]}
    manifest = {"format": 1, "rows": 1, "rows_per_shard": 1, "dtype": "float32", "recipe": {}}
    manifest |= {"unreadable_files": {}, "layout": "t2i", "columns": given}
    (tmp_path / "prepared.json").write_text(json.dumps(manifest))
    other = build(SourceSettings, {"path": str(tmp_path), "columns": {"caption": "d"}})
    with pytest.raises(SettingsError, match="columns: are .* but .* prepared with .*prepare it"):
        PreparedSource(other)


def test_a_prepared_folder_without_a_usable_row_is_refused_with_the_cause(tmp_path):
    manifest = {"format": 1, "rows": 1, "rows_per_shard": 1, "dtype": "float32", "recipe": {}}
    manifest |= {"unreadable_files": {}, "layout": "t2i"}
    (tmp_path / "prepared.json").write_text(json.dumps(manifest))
    write_shard(tmp_path / "00000.parquet", "t2i", iter([bad(BadRow("empty_image", "no bytes"))]))
    source = PreparedSource(build(SourceSettings, {"path": str(tmp_path)}))
    with pytest.raises(SettingsError, match=r"none of its 1 rows can be used \(empty_image 1\)"):
        check_usable(source, lambda example: None)


def test_rows_with_columns_of_their_own_do_not_fill_the_memory():
    reader = ColumnReader(known_columns.TEXT_TO_IMAGE)
    for number in range(2 * MOST_KEPT):
        row = {"image": b"", "text": "a", f"note {number}": 1}
        assert reader.columns(row) == {"image": ("image",), "caption": ("text",)}
    assert len(reader._found) <= MOST_KEPT


def test_old_names_keep_their_order(tmp_path):
    """Of captions, caption and text the first that holds a text is read, row by row."""
    rows = [
        {"image": picture(), "captions": '["a"]', "caption": "b", "text": "c", "prompt": "d"},
        {"image": picture(), "captions": None, "caption": "b", "text": "c", "prompt": "d"},
        {"image": picture(), "captions": "[]", "caption": " ", "text": "c", "prompt": "d"},
    ]
    source = opened(parquet(tmp_path / "a.parquet", *rows))
    assert [read(source, row).captions for row in range(3)] == [["a"], ["b"], ["c"]]
    write_t2i(
        tmp_path / "b.parquet", [{"image": picture(), "captions": '{"model": "m", "s": "a b"}'}]
    )
    assert read(opened(tmp_path / "b.parquet")).captions == ["a b"]
