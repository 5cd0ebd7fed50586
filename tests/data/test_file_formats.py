"""Parquet files, arrow files and archives as other programs write them."""

import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_runs import encoded, picture
from source_files import archive, captions, parquet, table

from uno_ds.data.sources import Source, SourceSettings
from uno_ds.settings import SettingsError


def test_a_first_row_group_without_rows(tmp_path, open_source):
    rows = table("a", "b")
    with pq.ParquetWriter(tmp_path / "a.parquet", rows.schema) as writer:
        writer.write_table(rows.slice(0, 0))
        writer.write_table(rows)
    assert captions(open_source(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_and_metadata_that_datasets_does_not_know(tmp_path, open_source, kind):
    rows = table("a", "b")
    spark = pa.array([[("x", "1")], []], pa.map_(pa.string(), pa.string()))
    rows = rows.append_column("tags", spark)
    rows = rows.append_column("kind", pa.array(["q", "q"]).dictionary_encode())
    unknown = {"info": {"features": {"image": {"_type": "Hologram"}, "caption": {"_type": "X"}}}}
    rows = rows.replace_schema_metadata({"huggingface": json.dumps(unknown), "pandas": "{"})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(rows, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write_table(rows)
    source = open_source(path)
    assert captions(source) == ["a", "b"]
    _, row = source._files.read(0)
    assert row["tags"] == {"x": "1"} and row["kind"] == "q"


def test_a_compressed_arrow_file_is_unpacked_and_not_held_in_memory(tmp_path, open_source):
    rows, options = table(*"abcdef"), pa.ipc.IpcWriteOptions(compression="zstd")
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as sink:
        with pa.ipc.new_stream(sink, rows.schema, options=options) as writer:
            writer.write_table(rows)
    assert captions(open_source(path)) == list("abcdef")
    assert len(list((tmp_path / "cache").glob("*/chunks"))) == 1


@pytest.mark.slow
def test_a_row_group_of_lists_above_two_gigabytes(tmp_path, open_source):
    """A dictionary holds a value of 1 MiB once: the file has 1 MB, and its one row group 2.1 GiB
    when it is read."""
    value = np.random.default_rng(0).bytes(1 << 20)
    row = {"image_list": [value], "instruction_list": [["a"]]}
    schema = pa.schema(
        [
            ("image_list", pa.list_(pa.binary())),
            ("instruction_list", pa.list_(pa.list_(pa.string()))),
        ]
    )
    rows = pa.concat_tables([pa.Table.from_pylist([row] * 50, schema=schema)] * 43)
    pq.write_table(
        rows, tmp_path / "a.parquet", row_group_size=2150, dictionary_pagesize_limit=8 << 20
    )
    del rows
    source = open_source(tmp_path)
    assert len(source) == 2150 and source._files.read(2149)[1]["image_list"] == [value]


def test_large_rows_and_small_ones_are_found_by_their_number(tmp_path, open_source):
    """Chunks of the cache have different numbers of rows."""
    rng = np.random.default_rng(0)
    sizes = [int(size) for size in rng.choice([0, 10, 1000, 300_000], 300)]
    rows = pa.table(
        {
            "image": [rng.bytes(size) for size in sizes],
            "caption": [f"row {number}" for number in range(300)],
        }
    )
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=70)
    files = open_source(tmp_path)._files
    for index in (*range(300), 150, 3):
        _, row = files.read(index)
        assert row["caption"] == f"row {index}" and len(row["image"]) == sizes[index]


def test_dots_in_the_names_of_an_archive(tmp_path, open_source):
    image = encoded(picture())
    named = {
        "photo.v1.jpg": image,
        "photo.v1.txt": b"one",
        "photo.v2.jpg": image,
        "photo.v2.txt": b"two",
        "plain.jpg": image,
        "plain.mask.png": image[:40],
        "plain.txt": b"three",
        "1.5.JPG": image,
        "1.5.json": b'{"caption": "four"}',
    }
    assert captions(open_source(archive(tmp_path / "a.tar", named))) == [
        "one",
        "two",
        "three",
        "four",
    ]


def test_long_names_are_cut_in_messages(tmp_path, open_source):
    name = "x" * 10_000_000
    pq.write_table(pa.table({name: [1]}), tmp_path / "a.parquet")
    with pytest.raises(SettingsError, match="its layout cannot be inferred") as refused:
        open_source(tmp_path)
    assert len(str(refused.value)) < 2000
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as file:
        file.addfile(tarfile.TarInfo("../" + "y/" * 200_000 + "a.png"))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(SettingsError, match="points out of the archive") as refused:
        open_source(tmp_path)
    assert len(str(refused.value)) < 2000


def test_a_full_cache_is_named_as_the_cause(tmp_path):
    (tmp_path / "file").write_text("")
    path = parquet(tmp_path / "a.parquet", "a")
    with pytest.raises(SettingsError, match="cannot be unpacked into '.*file/cache': Not a dir"):
        Source(SourceSettings(path=str(path)), cache=tmp_path / "file" / "cache")
