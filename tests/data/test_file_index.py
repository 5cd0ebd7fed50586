"""The index of a source's files: a second start opens none of them, and what changed is seen."""

import os
from pathlib import Path

import pytest
from public_rows import archive, lines, opened, parquet, read
from shaded_rows import picture, shade_of

from uno_ds.data import file_index, files

COUNT = 9


@pytest.fixture(autouse=True)
def no_threshold(monkeypatch):
    monkeypatch.setattr(file_index, "FEWEST_BYTES", 0)


@pytest.fixture
def opens(monkeypatch) -> list[Path]:
    """The files that are opened."""
    found: list[Path] = []
    open_rows = files.open_rows

    def recorded(path, cache=None):
        found.append(path)
        return open_rows(path, cache)

    monkeypatch.setattr(files, "open_rows", recorded)
    return found


def write(kind: str, path: Path, shade: int, rows: int = 1) -> None:
    if kind == "parquet":
        parquet(path, *[{"image": picture(shade), "text": "a cup"}] * rows)
    elif kind == "tar":
        members = {f"{row}.png": picture(shade) for row in range(rows)}
        members |= {f"{row}.txt": b"a cup" for row in range(rows)}
        archive(path, dict(sorted(members.items())))
    else:
        (path.parent / f"{shade}.png").write_bytes(picture(shade))
        lines(path, *[{"image": f"{shade}.png", "text": "a cup"}] * rows)


@pytest.fixture(params=["parquet", "tar", "jsonl"])
def shards(request, tmp_path) -> tuple[str, Path]:
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(COUNT):
        write(request.param, folder / f"{number}.{request.param}", 10 * number)
    return request.param, folder


def shades(source) -> list[int]:
    return [shade_of(read(source, row).image) for row in range(len(source))]


def test_a_second_start_opens_only_what_it_reads(shards, opens):
    kind, folder = shards
    first = opened(folder)
    assert len(opens) == COUNT
    expected = shades(first)
    opens.clear()
    again = opened(folder)
    # The first file, whose rows show where the images are.
    assert len(again) == COUNT and [path.name for path in opens] == [f"0.{kind}"]
    assert shades(again) == expected == [10 * number for number in range(COUNT)]
    assert len(opens) == COUNT


def test_a_file_that_changed_is_opened_again(shards, opens):
    kind, folder = shards
    opened(folder)
    changed = folder / f"3.{kind}"
    before = changed.stat()
    write(kind, changed, 99, rows=2)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    write(kind, folder / f"9.{kind}", 200)
    opens.clear()
    again = opened(folder)
    assert len(again) == COUNT + 2
    assert shades(again) == [0, 10, 20, 99, 99, 40, 50, 60, 70, 80, 200]


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"format": 7}', b'{"format": 1, "files": {"a": 1}}']
)
def test_a_damaged_index_is_made_again(shards, opens, content):
    _, folder = shards
    expected = shades(opened(folder))
    cache = folder.parent / "cache"
    (index,) = (cache / "indices").iterdir()
    index.write_bytes(content)
    for kept in (cache / "places").glob("*"):
        kept.write_bytes(content)
    opens.clear()
    assert shades(opened(folder)) == expected and len(opens) == COUNT
    assert index.read_bytes() != content


def test_without_a_cache_that_can_be_written_every_start_opens_the_files(tmp_path, opens):
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(COUNT):
        write("jsonl", folder / f"{number}.jsonl", number)
    (tmp_path / "cache").write_text("in the way of the folder")
    assert shades(opened(folder)) == shades(opened(folder)) == list(range(COUNT))


def test_a_file_that_is_lost_after_a_start_from_the_index_costs_its_rows_only(shards):
    kind, folder = shards
    opened(folder)
    again = opened(folder)
    (folder / f"4.{kind}").unlink()
    rows = [row for row in range(COUNT) if row != 4]
    assert [shade_of(read(again, row).image) for row in rows] == [10 * row for row in rows]


def test_few_files_are_kept_in_no_index(tmp_path):
    write("jsonl", tmp_path / "rows.jsonl", 3)
    opened(tmp_path / "rows.jsonl")
    assert not (tmp_path / "cache/indices").exists()
