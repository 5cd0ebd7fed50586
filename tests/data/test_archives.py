"""Webdataset archives: only broken samples and archives are lost, and no member points outside."""

import json
from pathlib import Path

import pytest
from shaded_rows import CAPTIONS, cause, picture, read, shade_of
from source_files import archive


def test_webdataset_archives_give_their_samples_and_only_broken_ones_are_lost(
    tmp_path, open_source
):
    path = archive(
        tmp_path / "a.tar",
        [
            ("000.jpg", picture(60, "JPEG")),
            ("000.txt", b"a cup"),
            ("001.png", picture(61)),
            ("001.json", CAPTIONS.encode()),
            ("002.webp", picture(62, "WEBP")),
            ("002.json", b"{broken"),
            ("003.png", picture(63)),
            ("004.txt", b"no image"),
            ("dir/005.png", picture(65)),
            ("dir/005.json", json.dumps({"caption": "in a folder"}).encode()),
        ],
    )
    source = open_source(path)
    assert (len(source), source.layout) == (6, "t2i")
    assert abs(shade_of(read(source, 0).image) - 60) < 4 and read(source, 0).captions == ["a cup"]
    assert [cause(source, row) for row in (2, 3, 4)] == ["bad_json", "no_caption", "missing_image"]
    assert read(source, 5).captions == ["in a folder"] and shade_of(read(source, 5).image) == 65


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png"])
def test_an_archive_with_members_that_point_out_of_it_is_refused(tmp_path, open_source, name):
    archive(tmp_path / "a.tar", [(name, picture()), (name.replace("png", "txt"), b"a cup")])
    archive(tmp_path / "b.tar", [("x.png", picture()), ("x.txt", b"a cup")])
    source = open_source(tmp_path)
    assert (
        len(source) == 1
        and "points out of the archive" in source.unreadable_files[str(tmp_path / "a.tar")]
    )


def test_a_truncated_archive_is_skipped(tmp_path, open_source):
    members = [
        (f"{row}.{kind}", body)
        for row in range(3)
        for kind, body in (("png", picture()), ("txt", b"a cup"))
    ]
    data = archive(tmp_path / "b.tar", members).read_bytes()
    for name, length in (
        ("a.tar", 1300),
        ("c.tar", 600),
        ("d.tar", 100),
        ("e.tar", 1024 + 512 + 2),
    ):
        (tmp_path / name).write_bytes(data[:length])
    source = open_source(tmp_path)
    assert len(source) == 3 and [Path(name).name for name in source.unreadable_files] == [
        "a.tar",
        "c.tar",
        "d.tar",
        "e.tar",
    ]
