"""An image folder with a metadata.csv."""

from pathlib import Path

import pytest
from public_rows import cause, lines, opened, read
from shaded_rows import picture, shade_of

from uno_ds.settings import SettingsError

HEADER = "file_name,text,count\n"


def folder(path: Path, content: str, images: int = 3) -> Path:
    (path / "train").mkdir(parents=True)
    for number in range(images):
        (path / f"train/{number}.png").write_bytes(picture(number))
    (path / "metadata.csv").write_text(content, encoding="utf-8")
    return path


def test_rows_of_the_metadata_are_those_of_the_folder(tmp_path):
    rows = 'train/0.png,"a cup, red",1\ntrain/1.png,"two\nlines",2\ntrain/2.png,7,\n'
    source = opened(folder(tmp_path / "set", "\ufeff" + HEADER + rows))
    assert source.layout == "t2i" and len(source) == 3
    assert [read(source, row).captions for row in range(3)] == [
        ["a cup, red"],
        ["two\nlines"],
        ["7"],
    ]
    assert [shade_of(read(source, row).image) for row in range(3)] == [0, 1, 2]
    assert source.columns(2) == ["file_name", "text", "count"]
    assert source.value(2, "count") is None
    again = opened(tmp_path / "set/metadata.csv")
    assert read(again, 1).captions == ["two\nlines"]


def test_other_data_of_a_folder_comes_first_and_a_bad_row_costs_itself_alone(tmp_path):
    base = folder(
        tmp_path / "set", HEADER + "train/0.png,,1\ntrain/9.png,a cup,1\ntrain/1.png,b,1\n"
    )
    source = opened(base)
    assert [cause(source, row) for row in (0, 1)] == ["no_caption", "missing_image"]
    assert read(source, 2).captions == ["b"]
    lines(base / "metadata.jsonl", {"file_name": "train/2.png", "text": "of json"})
    assert [read(opened(base), 0).captions] == [["of json"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + "a,b\n", "ArrowInvalid"),
        ("file_name,file_name\na,b\n", "a name twice"),
        ("", "its files hold no rows|Empty CSV file"),
    ],
)
def test_a_file_that_is_no_table_is_named_in_one_line(tmp_path, content, message):
    with pytest.raises(SettingsError, match=message) as raised:
        opened(folder(tmp_path / "set", content))
    assert "metadata.csv" in str(raised.value) and "\n" not in str(raised.value)
