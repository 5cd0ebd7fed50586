"""No file kills the process that reads it or holds it up; what happens is named."""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import random
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_runs import encoded, picture
from source_files import archive, arrow, parquet

from uno_ds.commands.train import main
from uno_ds.data import sources
from uno_ds.data.files import Files
from uno_ds.data.images import BadRow
from uno_ds.data.prepared import FORMAT, MANIFEST, PreparedSource, claim
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.settings import SettingsError


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
    reported = in_a_child(read_all, tmp_path, tmp_path / "cache")
    assert reported["unreadable"] == {str(path): f"a member has the size {size}"}


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
    reported = []
    for index in range(len(files)):
        with pytest.raises(BadRow) as bad:
            files.read(index)
        reported.append(str(bad.value))
    return reported


def test_an_arrow_file_that_is_rewritten_while_it_is_mapped_costs_its_rows(tmp_path):
    path = arrow(tmp_path / "a.arrow", *"abcdefgh")
    reported = in_a_child(read_after_rewriting, path)
    assert reported == [f"lost_file: {path}: it was written to since it was opened"] * 8


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
    reported = in_a_child(read_all, pipe, tmp_path / "cache")
    assert "is a named pipe" in reported["refused"]


def test_a_named_pipe_in_an_image_s_place_costs_its_row(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    os.mkfifo(tmp_path / "b.png")
    rows = [{"image": f"{name}.png", "caption": "a"} for name in "ab"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (bad,) = in_a_child(read_all, tmp_path, tmp_path / "cache")["bad"]
    assert bad.startswith("missing_image: ") and "is a named pipe" in bad


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
    reported = in_a_child(open_prepared, tmp_path)
    assert "00000.parquet' is not readable" in reported and "is a named pipe" in reported


def test_a_preparation_goes_on_whatever_words_a_library_has_for_an_unreadable_file(tmp_path):
    claim(tmp_path / "a", manifest(unreadable_files={"b.parquet": "words"}))
    claim(tmp_path / "a", manifest(unreadable_files={"b.parquet": "other words"}))
    with pytest.raises(SettingsError, match="unreadable_files"):
        claim(tmp_path / "a", manifest(unreadable_files={"c.parquet": "words"}))
