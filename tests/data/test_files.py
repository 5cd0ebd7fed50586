"""Which files a source reads and how: what is read is what was meant, and what is left out is
named."""

import contextlib
import faulthandler
import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_runs import encoded, picture, tree

from uno_ds.commands.train import main
from uno_ds.data import sources
from uno_ds.data.files import Files
from uno_ds.data.images import BadRow
from uno_ds.data.prepared import FORMAT, MANIFEST, PreparedSource, claim
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.settings import SettingsError, build

Open = Callable[..., Source]


@pytest.fixture
def open_source(tmp_path: Path) -> Open:
    def opened(path: Path | str, **values: Any) -> Source:
        return Source(
            build(SourceSettings, {"path": str(path), **values}),
            root=tmp_path / "root",
            cache=tmp_path / "cache",
        )

    return opened


def captions(source: Source) -> list[str]:
    """Of all rows, one each."""
    rng = np.random.default_rng(0)
    return [source.read(index, rng).captions[0] for index in range(len(source))]


def table(*words: str) -> pa.Table:
    rows = [{"image": encoded(picture()), "caption": word} for word in words]
    return pa.Table.from_pylist(rows)


def parquet(path: Path, *words: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(*words), path)
    return path


def arrow(path: Path, *words: str) -> Path:
    rows = table(*words)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=4)
    return path


def archive(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


# Unreadable files.


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
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_a_source_most_of_whose_files_cannot_be_read_is_refused_by_name(tmp_path, capsys):
    folder = one_good_of_four(tmp_path / "photos")
    assert main(["--dry-run", "--recipe", recipe(tmp_path, folder)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "3 of its 4 files cannot be read" in told
    assert "data.max_unreadable_fraction = 0.5" in told
    assert all(f"{name}.parquet': " in told for name in "bcd")


@pytest.mark.usefixtures("alone")
def test_the_dry_run_names_each_unreadable_file_with_its_reason(tmp_path, capsys):
    folder = one_good_of_four(tmp_path / "photos")
    path = recipe(tmp_path, folder, max_unreadable_fraction=0.75)
    assert main(["--dry-run", "--json", "--recipe", path]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(told["unreadable_files"]) == [str(folder / f"{name}.parquet") for name in "bcd"]
    assert all(told["unreadable_files"].values()) and len(told["warnings"]) == 3
    assert main(["--dry-run", "--recipe", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith("warning: ") and "cannot be read" in line]
    assert len(named) == 3 and "b.parquet" in named[0]
    assert any("valid except for 3 unreadable data file(s)" in line for line in lines)


# Folders, links and sets of `datasets`.


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


# Splits and companions.


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


# Parquet and arrow as other programs write them.


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


# Archives.


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


def with_size(data: bytes, at: int, size: int) -> bytes:
    """The archive with another size in the header at that offset, in base 256, and the header's
    checksum."""
    header = bytearray(data[at : at + 512])
    header[124:136] = (size % (1 << 96)).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


@pytest.mark.parametrize("size", [-512, -1024, -(1 << 40)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_member_of_negative_size_ends_no_reader(tmp_path, kind, size):
    archive(tmp_path / "b.tar", {"a.png": encoded(picture()), "a.txt": b"a"})
    members = {"a.png": encoded(picture()), "a.txt": b"a", "b.png": b"", "c.txt": b"c"}
    path = archive(tmp_path / "a.tar", members)
    data = path.read_bytes()
    at = data.index(b"b.png")
    data = data[: at + 156] + kind + data[at + 157 :]
    path.write_bytes(with_size(data, at, size))
    told = in_a_child(read_all, tmp_path, tmp_path / "cache")
    assert told["unreadable"] == {str(path): f"a member has the size {size}"}


# What must neither kill the process nor hold it up.


def in_a_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a forked process: what kills or holds up a reader costs the
    child."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function(*arguments)))
    child.start()
    sender.close()
    try:
        assert receiver.poll(30), "the reader is held up"
        return receiver.recv()
    except EOFError:
        child.join()
        raise AssertionError(f"the reader ended with {child.exitcode}") from None
    finally:
        child.kill()
        child.join()


def read_all(path: Path, cache: Path) -> dict[str, Any]:
    try:
        source = Source(SourceSettings(path=str(path)), cache=cache)
    except SettingsError as error:
        return {"refused": str(error)}
    bad = []
    for index in range(len(source)):
        try:
            source.read(index, np.random.default_rng(0))
        except BadRow as error:
            bad.append(str(error))
    return {"rows": len(source), "bad": bad, "unreadable": source.unreadable_files}


def read_with_flipped_bits(path: Path, count: int) -> int:
    """Reads every row of the file, with one random bit of it flipped each time; how often it was
    refused."""
    whole, refused = path.read_bytes(), 0
    for seed in range(count):
        place = random.Random(seed).randrange(8 * len(whole))
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.unlink()
        path.write_bytes(data)
        files = Files([path], path.parent / "cache")
        refused += len(files.unreadable)
        for index in range(len(files)):
            with contextlib.suppress(BadRow):
                files.read(index)
    return refused


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_flipped_bit_in_an_arrow_file_kills_no_process(tmp_path, kind):
    schema = pa.schema(
        [
            ("image_list", pa.list_(pa.binary())),
            ("caption", pa.string()),
            ("size", pa.struct([("width", pa.int32()), ("tags", pa.list_(pa.string()))])),
        ]
    )
    row = {
        "image_list": [b"a" * 20, b"b"],
        "caption": "a cup",
        "size": {"width": 3, "tags": ["x"]},
    }
    rows = pa.Table.from_pylist([row, {**row, "caption": None}] * 8, schema=schema)
    path = tmp_path / "a.arrow"
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=5)
    # Of random flips a good part hits structure; none of those may pass as a whole file.
    assert in_a_child(read_with_flipped_bits, path, 500) > 100


def read_after_rewriting(path: Path) -> list[str]:
    """What reading each row says once other bytes stand in the file, whose size is the same."""
    files = Files([path])
    for index in range(len(files)):
        files.read(index)
    with path.open("r+b") as file:
        file.write(random.Random(0).randbytes(path.stat().st_size))
    os.utime(path, (10**9, 10**9))
    told = []
    for index in range(len(files)):
        with pytest.raises(BadRow) as bad:
            files.read(index)
        told.append(str(bad.value))
    return told


def test_an_arrow_file_that_is_rewritten_while_it_is_mapped_costs_its_rows(tmp_path):
    path = arrow(tmp_path / "a.arrow", *"abcdefgh")
    told = in_a_child(read_after_rewriting, path)
    assert told == [f"lost_file: {path}: it was written to since it was opened"] * 8


def die_while_decoding(path: Path, written: Path) -> None:
    source = Source(SourceSettings(path=str(path)))
    sources.decode = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)
    with written.open("w") as file:
        faulthandler.enable(file)
        source.read(0, np.random.default_rng(0))


def test_a_process_that_a_signal_kills_names_the_data_file(tmp_path, monkeypatch, capsys):
    path, written = arrow(tmp_path / "a.arrow", "a"), tmp_path / "written"
    with pytest.raises(AssertionError, match=f"ended with -{signal.SIGSEGV.value}"):
        in_a_child(die_while_decoding, path, written)
    assert f"\"<data file '{path}'>\", line" in written.read_text()
    enabled = []
    monkeypatch.setattr(faulthandler, "is_enabled", lambda: False)
    monkeypatch.setattr(faulthandler, "enable", lambda: enabled.append(True))
    assert main(["--recipe", "absent"]) == 2 and enabled


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar", "jsonl"])
def test_a_named_pipe_in_a_file_s_place_is_named_and_holds_nobody_up(tmp_path, kind):
    parquet(tmp_path / "data" / "b.parquet", *"ab")
    pipe = tmp_path / "data" / f"a.{kind}"
    os.mkfifo(pipe)
    assert in_a_child(read_all, tmp_path / "data", tmp_path / "cache") == {
        "rows": 2,
        "bad": [],
        "unreadable": {str(pipe): "is a named pipe, not a regular file"},
    }
    told = in_a_child(read_all, pipe, tmp_path / "cache")
    assert "is a named pipe" in told["refused"]


def test_a_named_pipe_in_an_image_s_place_costs_its_row(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    os.mkfifo(tmp_path / "b.png")
    rows = [{"image": f"{name}.png", "caption": "a"} for name in "ab"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (bad,) = in_a_child(read_all, tmp_path, tmp_path / "cache")["bad"]
    assert bad.startswith("missing_image: ") and "is a named pipe" in bad


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


# Prepared folders.


def manifest(**changes: Any) -> dict[str, Any]:
    rows = {"rows": 1, "rows_per_shard": 1, "dtype": "float32", "layout": "t2i"}
    files = {"source": "x", "files": "0", "unreadable_files": {}}
    return {"format": FORMAT, **files, **rows, "recipe": {}, **changes}


def open_prepared(folder: Path) -> str:
    try:
        PreparedSource(SourceSettings(path=str(folder)))
    except SettingsError as error:
        return str(error)
    return ""


def test_a_named_pipe_in_a_prepared_folder_is_named_and_holds_nobody_up(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps(manifest()))
    os.mkfifo(tmp_path / "00000.parquet")
    told = in_a_child(open_prepared, tmp_path)
    assert "00000.parquet' is not readable" in told and "is a named pipe" in told


def test_a_preparation_goes_on_whatever_words_a_library_has_for_an_unreadable_file(tmp_path):
    claim(tmp_path / "a", manifest(unreadable_files={"b.parquet": "words"}))
    claim(tmp_path / "a", manifest(unreadable_files={"b.parquet": "other words"}))
    with pytest.raises(SettingsError, match="unreadable_files"):
        claim(tmp_path / "a", manifest(unreadable_files={"c.parquet": "words"}))
