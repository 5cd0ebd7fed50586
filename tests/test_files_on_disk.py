"""Only regular files are opened, and nothing in a file's place makes a reader wait."""

import os
import socket

import pytest

from uno_ds.files_on_disk import open_regular, read_regular


def test_a_file_and_a_link_to_it_are_read(tmp_path):
    (tmp_path / "file").write_text("words")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"words"
    with open_regular(tmp_path / "file", "r", encoding="utf-8") as stream:
        assert stream.read() == "words"


def test_what_is_no_regular_file_is_named_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    for path, kind in (
        (tmp_path / "pipe", "a named pipe"),
        (tmp_path / "socket", "a socket"),
        (tmp_path, "a folder"),
        ("/dev/zero", "a character device"),
    ):
        with pytest.raises(OSError) as caught:
            open_regular(path)
        assert caught.value.strerror == f"is {kind}, not a regular file"
    listener.close()


def test_a_name_that_no_file_can_have_is_an_oserror():
    for name in ("a\0b", "\ud800", "x" * 5000):
        with pytest.raises(OSError) as caught:
            open_regular(name)
        assert caught.value.strerror


def test_a_file_above_the_limit_is_not_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", limit=5) == b"12345"
    with pytest.raises(OSError, match="has 5 bytes, more than the 4 that are read"):
        read_regular(tmp_path / "file", limit=4)
