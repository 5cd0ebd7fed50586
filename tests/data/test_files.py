"""Which files a source reads: what is read is what was meant, and what is left out is named."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from no_launcher import remove_launcher
from small_runs import encoded, picture, tree
from source_files import archive, arrow, captions, parquet, table

from uno_ds.commands.train import main
from uno_ds.data.images import BadRow
from uno_ds.settings import SettingsError


def one_good_of_four(folder: Path) -> Path:
    parquet(folder / "a.parquet", *"abcdefgh")
    good = (folder / "a.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(good[:-100])
    (folder / "c.parquet").write_bytes(b"")
    (folder / "d.parquet").write_bytes(b"<html>404</html>")
    return folder


def recipe(folder: Path, source: Path, **changes: Any) -> str:
    plain = tree(folder, [source], name="files")
    plain["data"] |= changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    return str(path)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, and a cache of its own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    remove_launcher(monkeypatch)


@pytest.mark.usefixtures("alone")
def test_a_source_most_of_whose_files_cannot_be_read_is_refused_by_name(tmp_path, capsys):
    folder = one_good_of_four(tmp_path / "photos")
    assert main(["--dry-run", "--recipe", recipe(tmp_path, folder)]) == 2
    reported = capsys.readouterr().err
    assert reported.count("\n") == 1 and "3 of its 4 files cannot be read" in reported
    assert "data.max_unreadable_fraction = 0.5" in reported
    assert all(f"{name}.parquet': " in reported for name in "bcd")


@pytest.mark.usefixtures("alone")
def test_the_dry_run_names_each_unreadable_file_with_its_reason(tmp_path, capsys):
    folder = one_good_of_four(tmp_path / "photos")
    path = recipe(tmp_path, folder, max_unreadable_fraction=0.75)
    assert main(["--dry-run", "--json", "--recipe", path]) == 0
    reported = json.loads(capsys.readouterr().out)
    assert sorted(reported["unreadable_files"]) == [
        str(folder / f"{name}.parquet") for name in "bcd"
    ]
    assert all(reported["unreadable_files"].values()) and len(reported["warnings"]) == 3
    assert main(["--dry-run", "--recipe", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith("warning: ") and "cannot be read" in line]
    assert len(named) == 3 and "b.parquet" in named[0]
    assert any("valid except for 3 unreadable data file(s)" in line for line in lines)


def test_a_saved_set_is_what_its_state_lists(tmp_path, open_source):
    saved = tmp_path / "saved"
    words = list("abcdef")
    table_of_set = datasets.Dataset(table(*words))
    table_of_set.save_to_disk(saved)
    loaded = datasets.load_from_disk(saved)
    loaded.map(lambda row: {"caption": row["caption"] * 2})
    loaded.filter(lambda row: row["caption"] > "b")
    loaded.shuffle(seed=0).flatten_indices()
    assert len(list(saved.glob("*.arrow"))) > 2
    source = open_source(saved)
    assert captions(source) == words
    assert any("that '" in note and "state.json' does not list" in note for note in source.notes)
    assert captions(open_source(f"{saved}/*.arrow")) == words
    next(saved.glob("data-*")).unlink()
    with pytest.raises(SettingsError, match="data-00000-of-00001.arrow': No such file"):
        open_source(saved)


def test_the_cache_of_a_loaded_set_is_not_read_as_data(tmp_path, open_source):
    for name in ("set-00000-of-00001", "cache-0123456789abcdef", "cache-77aa_00000_of_00002"):
        arrow(tmp_path / f"{name}.arrow", name)
    source = open_source(tmp_path)
    assert captions(source) == ["set-00000-of-00001"] and "as a cache" in source.notes[0]


def test_a_linked_folder_is_walked_and_a_loop_is_not(tmp_path, open_source):
    data, other = tmp_path / "data", tmp_path / "other"
    parquet(data / "a.parquet", "a", "b")
    parquet(other / "deep" / "b.parquet", "c", "d", "e", "f")
    (data / "more").symlink_to(other)
    (other / "deep" / "loop").symlink_to(data)
    (data / "again").symlink_to(data / "more" / "deep")
    (data / "up").symlink_to(tmp_path)
    (data / "self").symlink_to("self")
    assert sorted(captions(open_source(data))) == list("abcdef")


def test_a_file_is_read_once_however_many_links_lead_to_it(tmp_path, open_source):
    parquet(tmp_path / "b.parquet", "a")
    (tmp_path / "a.parquet").symlink_to(tmp_path / "b.parquet")
    source = open_source(tmp_path)
    assert captions(source) == ["a"] and source.paths == [tmp_path / "b.parquet"]
    assert "under another name" in source.notes[0]


def hub(folder: Path, files: dict[str, bytes]) -> Path:
    """A snapshot of the hub's cache: links into `blobs`."""
    snapshot = folder / "datasets--a--b" / "snapshots" / "0123abc"
    (folder / "datasets--a--b" / "blobs").mkdir(parents=True)
    for number, (name, data) in enumerate(files.items()):
        blob = folder / "datasets--a--b" / "blobs" / f"{number:064x}"
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def test_a_snapshot_of_the_hub_is_read_through_its_links_and_nothing_else_is(tmp_path, open_source):
    lines = [
        {"image": name, "caption": "a"} for name in ("images/a.png", "out.png", "../../../x.png")
    ]
    rows = "\n".join(map(json.dumps, lines)).encode()
    image = encoded(picture(), "PNG")
    snapshot = hub(tmp_path, {"rows.jsonl": rows, "images/a.png": image})
    for outside in (tmp_path / "x.png", tmp_path / "datasets--a--b" / "x.png"):
        outside.write_bytes(image)
    (snapshot / "images" / "out.png").symlink_to(tmp_path / "x.png")
    for source in (open_source(snapshot), open_source(snapshot, images=str(snapshot))):
        rng = np.random.default_rng(0)
        if source.settings.images is None:
            (snapshot / "images" / "images").symlink_to(snapshot / "images")
        assert source.read(0, rng).image.size == (40, 30)
        with pytest.raises(BadRow, match="missing_image"):
            source.read(1, rng)
        with pytest.raises(BadRow, match="outside of the folder"):
            source.read(2, rng)


def test_a_file_replaced_within_the_same_time_is_read_anew(tmp_path, open_source):
    path = tmp_path / "a.parquet"
    for word in "ab":
        pq.write_table(table(word), path, write_statistics=False)
        os.utime(path, ns=(10**18, 10**18))
        assert captions(open_source(path)) == [word]


def test_an_unchanged_file_is_unpacked_once_and_a_damaged_copy_again(tmp_path, open_source):
    path = parquet(tmp_path / "a.parquet", *"ab")
    assert captions(open_source(path)) == ["a", "b"]
    (chunks,) = (tmp_path / "cache").glob("*/chunks")
    before = chunks.stat().st_ino
    assert captions(open_source(path)) == ["a", "b"] and chunks.stat().st_ino == before
    os.truncate(chunks, chunks.stat().st_size - 8)
    assert captions(open_source(path)) == ["a", "b"]
    index = chunks.with_name("index")
    data = bytearray(index.read_bytes())
    data[31] ^= 16  # of the number of rows
    index.write_bytes(data)
    assert captions(open_source(path)) == ["a", "b"]
    assert list((tmp_path / "cache").glob(".*")) == []


def test_only_train_is_read_where_files_are_named_by_splits(tmp_path, open_source):
    names = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "my_test")
    for name in names:
        parquet(tmp_path / f"{name}.parquet", name)
    source = open_source(tmp_path)
    assert captions(source) == list(names[:2])
    (note,) = source.notes
    assert "test 1, train 2, validation 1" in note and "data.sources[].split" in note
    assert captions(open_source(tmp_path, split="val")) == [names[2]]
    assert len(open_source(tmp_path, split="all")) == 4
    assert captions(open_source(f"{tmp_path}/validation-*")) == [names[2]]
    assert captions(open_source(tmp_path / "my_test.parquet")) == ["my_test"]
    with pytest.raises(SettingsError, match="^split: is 'gold', and .* no file of it; .* train 2"):
        open_source(tmp_path, split="gold")


def test_splits_in_names_of_folders_and_files_without_one(tmp_path, open_source):
    for name in ("test/a", "val/train_like", "b/00000"):
        parquet(tmp_path / "data" / f"{name}.parquet", name)
    assert captions(open_source(tmp_path / "data")) == ["b/00000", "val/train_like"]
    assert captions(open_source(tmp_path / "data" / "test")) == ["test/a"]


def test_a_folder_of_splits_without_train_asks_which(tmp_path, open_source):
    for name in ("test", "validation"):
        parquet(tmp_path / f"{name}.parquet", name)
    with pytest.raises(SettingsError, match="splits test, validation and none of train") as refused:
        open_source(tmp_path)
    assert refused.value.key == "split"


def test_a_saved_set_of_splits(tmp_path, open_source):
    splits = {name: datasets.Dataset(table(name)) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert captions(open_source(tmp_path / "saved")) == ["train"]
    assert captions(open_source(tmp_path / "saved", split="test")) == ["test"]
    splits = {name: datasets.Dataset(table(name)) for name in ("chats", "edits")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "others")
    with pytest.raises(SettingsError, match="the splits chats, edits and none of train"):
        open_source(tmp_path / "others")
    assert captions(open_source(tmp_path / "others", split="chats")) == ["chats"]


def test_the_tables_that_img2dataset_writes_beside_archives_are_left_out(tmp_path, open_source):
    for number in range(2):
        members = {f"{number}0.jpg": encoded(picture()), f"{number}0.txt": b"a cup"}
        archive(tmp_path / f"0000{number}.tar", members)
        urls = pa.table({"url": ["http://x"] * 400, "caption": ["a"] * 400, "key": ["0"] * 400})
        pq.write_table(urls, tmp_path / f"0000{number}.parquet")
        (tmp_path / f"0000{number}_stats.json").write_text("{}")
    source = open_source(tmp_path)
    assert captions(source) == ["a cup"] * 2
    assert source.notes == [
        "leaves out 2 files without a column of images or conversations, each beside an archive of "
        f"the same name ('{tmp_path / '00000.parquet'}')"
    ]
