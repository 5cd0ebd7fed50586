"""Rows of data files by index: parquet and arrow tables, webdataset tar and json lines by offset.

Every file is opened on its own, so that a broken one costs its own rows only. A row is a dictionary
of raw columns: images stay encoded bytes."""

import bisect
import functools
import itertools
import json
import os
import tarfile
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from uno_ds.data.columns import plain_name
from uno_ds.data.csv_rows import CsvRows
from uno_ds.data.file_index import Entry, FileIndex, LazyRows, kept_arrays
from uno_ds.data.images import BadRow
from uno_ds.data.json_array import array_spans, begins_array
from uno_ds.data.known_columns import MEMBERS
from uno_ds.data.tables import UnreadableFile, open_arrow, open_parquet
from uno_ds.files_on_disk import open_regular
from uno_ds.settings import printable

LONGEST_PATH = 300  # characters of it that are shown
SUFFIXES = (".parquet", ".arrow", ".tar", ".jsonl", ".ndjson")
# Read where it is named, or in a folder that has no file of the others: an array of objects, or
# lines of them.
JSON_SUFFIX = ".json"
TAR_IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff")
TAR_COLUMNS = {*TAR_IMAGES, "txt", "json"}
# Bytes of one file in an archive, and of a header that is not one of a file: it holds a long name
# or attributes.
LARGEST_MEMBER, LARGEST_HEADER = 1024**3, 1024**2


class RowFile(Protocol):
    """One data file. `read` raises BadRow, or any exception if the file has changed meanwhile."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Mapping[str, Any]: ...


class Files:
    """The readable files of a list, as one sequence of rows. `unreadable` maps the others to the
    reason, and `lost` those that went away, became shorter or (arrow) were written to since; their
    rows are bad from then on."""

    def __init__(self, paths: list[Path], cache: Path | None = None):
        self.paths: list[Path] = []
        self.lost: dict[str, str] = {}
        self._seen: list[os.stat_result] = []
        self.unreadable: dict[str, str] = {}
        self._files: list[RowFile] = []
        self._ends: list[int] = []
        # Of each file, the columns of its first row that have a value; None if it has none.
        self.first_columns: list[tuple[str, ...] | None] = []
        index = FileIndex(paths, cache)
        for path in paths:
            try:
                seen, file, columns = named_after(path)(_open, path, cache, index)
            except UnreadableFile as error:
                self.unreadable[printable(path, LONGEST_PATH)] = printable(error, 300)
                continue
            self.paths.append(path)
            self._seen.append(seen)
            self._files.append(file)
            self._ends.append(len(self) + len(file))
            self.first_columns.append(columns)
        index.save()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def first_rows(self, count: int) -> list[range]:
        """For each file, the indices of its first `count` rows."""
        return [
            range(end - len(file), min(end, end - len(file) + count))
            for file, end in zip(self._files, self._ends, strict=True)
        ]

    def locate(self, index: int) -> tuple[Path, int]:
        """The file of row `index`, and the row's number in it."""
        which = bisect.bisect_right(self._ends, index)
        return self.paths[which], index - (self._ends[which - 1] if which else 0)

    def read(self, index: int) -> tuple[Path, Mapping[str, Any]]:
        """The file and the columns of row `index`. Raises BadRow."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        which = bisect.bisect_right(self._ends, index)
        start = self._ends[which - 1] if which else 0
        self._check_present(which)
        try:
            row = named_after(self.paths[which])(self._files[which].read, index - start)
        except BadRow:
            raise
        except Exception as error:
            raise BadRow("bad_row", f"{self.paths[which].name}: {one_line(error)}") from None
        if not isinstance(row, Mapping):
            raise BadRow(
                "bad_row",
                f"{self.paths[which].name}: a row must be a mapping, not a {type(row).__name__}",
            )
        return self.paths[which], row

    def _check_present(self, which: int) -> None:
        path = self.paths[which]
        # Parquet was unpacked. A look at a file costs microseconds; reading a mapped one beyond its
        # end, or by offsets that another program is writing, would kill the process.
        if path.suffix == ".parquet":
            return
        shown = printable(path, LONGEST_PATH)
        if shown not in self.lost:
            reason = _change(path, self._seen[which])
            if reason is None:
                return
            self.lost[shown] = reason
        raise BadRow("lost_file", f"{shown}: {self.lost[shown]}")


def _change(path: Path, before: os.stat_result) -> str | None:
    """What happened to the file since it was opened, or None. Other files than arrow may grow."""
    try:
        now = path.stat()
    except OSError as error:
        return error.strerror or str(error)
    if now.st_size < before.st_size:
        return f"it has {now.st_size:,} bytes instead of {before.st_size:,}"
    if path.suffix == ".arrow" and now.st_mtime_ns != before.st_mtime_ns:
        return "it was written to since it was opened"
    return None


def _open(
    path: Path, cache: Path | None, index: FileIndex
) -> tuple[os.stat_result, RowFile, tuple[str, ...] | None]:
    """(its state, its rows, the columns of the first one). Raises UnreadableFile."""
    try:
        before = path.stat()
    except OSError as error:
        raise UnreadableFile(error.strerror or str(error)) from None
    entry = index.find(path, before)
    if entry is not None:
        lazy = LazyRows(entry.rows, functools.partial(open_rows, path, cache))
        return before, lazy, entry.columns
    file = open_rows(path, cache)
    columns = _first_columns(file)
    index.add(path, before, Entry(len(file), columns))
    return before, file, columns


def _first_columns(file: RowFile) -> tuple[str, ...] | None:
    if not len(file):
        return None
    try:
        row = file.read(0)
        return tuple(str(column) for column, value in row.items() if value is not None)
    except Exception:  # what is wrong with the row is found when it is read
        return None


def open_rows(path: Path, cache: Path | None = None) -> RowFile:
    """Opens one file by its suffix. Raises UnreadableFile."""
    openers: dict[str, Callable[[], RowFile]] = {
        ".parquet": lambda: open_parquet(path, cache),
        ".arrow": lambda: open_arrow(path, cache),
        ".tar": lambda: _Tar(path, cache),
        ".jsonl": lambda: _Lines(path, cache),
        ".ndjson": lambda: _Lines(path, cache),
        ".csv": lambda: CsvRows(path),
        JSON_SUFFIX: lambda: _Lines(path, cache, is_array=begins_array(path)),
    }
    if path.suffix not in openers:
        raise UnreadableFile(f"the suffix is none of {', '.join(openers)}")
    open_file = openers[path.suffix]
    try:
        return open_file()
    except UnreadableFile:
        raise
    except OSError as error:
        raise UnreadableFile(printable(error.strerror or one_line(error), 300)) from None
    except Exception as error:  # each library has its own ways to fail on broken bytes
        raise UnreadableFile(one_line(error)) from None


@functools.cache
def named_after(path: Path) -> Callable[..., Any]:
    """A function that calls its first argument with the others, in a stack frame named after the
    file: if a signal kills the process inside a library that reads or decodes, the traceback of
    faulthandler names the file."""
    # In brackets, or an ordinary traceback looks for lines of source in the data file.
    frame = f"<data file '{printable(path, LONGEST_PATH)}'>"
    code = _call.__code__.replace(co_filename=frame, co_name="row", co_qualname="row")
    return types.FunctionType(code, globals())


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def one_line(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether the resolved `path` lies in `folder` or, for a folder of a snapshot in the cache of
    the Hugging Face hub, in the `blobs` of the same repository, into which the files of a snapshot
    are links."""
    real = folder.resolve()
    if path.is_relative_to(real):
        return True
    snapshots = next((above for above in real.parents if above.name == "snapshots"), None)
    return snapshots is not None and path.parent == snapshots.parent / "blobs"


class _Lines:
    """A json lines file, by the byte offsets of its non-empty lines, or an array of objects."""

    def __init__(self, path: Path, cache: Path | None, is_array: bool = False):
        self._path = path
        spans = array_spans if is_array else _line_spans
        self._spans = kept_arrays(path, cache, lambda: {"spans": spans(path)})["spans"]

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, index: int) -> Mapping[str, Any]:
        start, length = self._spans[index]
        with open_regular(self._path) as stream:
            stream.seek(start)
            return parse_json(stream.read(length))


def _line_spans(path: Path) -> np.ndarray:
    """int64 [rows, 2]: offset and length of each line that is not empty."""
    spans = []
    position = 0
    with open_regular(path) as stream:
        for line in stream:
            if line.strip():
                spans.append((position, len(line)))
            position += len(line)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


class _Header(tarfile.TarInfo):
    """A header of an archive. A negative size would send the reader back without end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise UnreadableFile(f"a member has the size {header.size}")
        if header.type not in tarfile.REGULAR_TYPES and header.size > LARGEST_HEADER:
            raise UnreadableFile(
                f"a header of {header.size:,} bytes is none of an archive of images"
            )
        return header


class _Archive(tarfile.TarFile):
    # Of every header read so far. An attribute of TarFile that its type stubs leave out.
    members: list[tarfile.TarInfo]


class _Tar:
    """A webdataset archive: members with the same path up to the first dot of the name are one row.

    Read by the offsets of its members and not through `datasets`, which loses the archive for one
    broken member."""

    def __init__(self, path: Path, cache: Path | None):
        self._path = path
        found = kept_arrays(path, cache, lambda: _member_places(path))
        self._extensions: list[str] = found["extensions"].tolist()
        self._members_MC = found["members"]
        self._starts = found["starts"]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, index: int) -> Mapping[str, Any]:
        row: dict[str, Any] = {}
        sidecars: list[bytes] = []
        with open_regular(self._path) as stream:
            for which, offset, size in self._members_MC[slice(*self._starts[index : index + 2])]:
                extension = self._extensions[which]
                name, _, kind = extension.rpartition(".")
                if kind not in TAR_COLUMNS:
                    continue
                if size > LARGEST_MEMBER:
                    raise BadRow("bad_row", f"a member of {size:,} bytes")
                stream.seek(offset)
                data = stream.read(size)
                if len(data) < size:
                    raise BadRow("bad_row", f"{self._path.name} ends inside a member")
                if kind == "json":
                    sidecars.append(data)
                    continue
                value = data if kind in TAR_IMAGES else data.decode("utf-8-sig", "replace")
                # "0.source.jpg" is the column "source.jpg"; "0.jpg" is "jpg" and "image".
                row[extension] = value
                if not name:
                    row["image" if kind in TAR_IMAGES else "caption"] = value
        for data in sidecars:
            content = parse_json(data)
            row.update((key, value) for key, value in content.items() if key not in row)
        return row


def _member_places(path: Path) -> dict[str, np.ndarray]:
    """`members`, int64 [members, 3]: extension, offset and size; `starts`, int64 [rows + 1]: the
    first member of each row, and the end; `extensions`: the names that `members` counts. Raises
    UnreadableFile."""
    with open_regular(path) as stream:
        with _Archive.open(fileobj=stream, mode="r:", tarinfo=_Header) as archive:
            files = list(_members(archive))
            end = archive.offset
        # tarfile takes half a header for the end; a whole archive has a block of zeros there, or
        # (some writers) nothing.
        stream.seek(end)
        block = stream.read(tarfile.BLOCKSIZE)
        if block not in (b"", bytes(tarfile.BLOCKSIZE)):
            raise UnreadableFile(f"the archive is cut or broken at byte {end}")
    numbers: dict[str, int] = {}
    members: list[tuple[int, int, int]] = []
    starts = [0]
    groups = itertools.groupby(files, key=lambda member: (member[0], _stem(member[1])))
    for _, group in groups:
        for row in _rows_of(list(group)):
            for extension, place in row.items():
                members.append((numbers.setdefault(extension, len(numbers)), *place))
            starts.append(len(members))
    return {
        "extensions": np.array(list(numbers), dtype=np.str_),
        "members": np.array(members, dtype=np.int64).reshape(-1, 3),
        "starts": np.array(starts, dtype=np.int64),
    }


# Of an archive: (folder, name, (offset, size)).
_Member = tuple[PurePosixPath, str, tuple[int, int]]


def _members(archive: _Archive) -> Iterator[_Member]:
    """The files with an extension."""
    for member in archive:
        inside = PurePosixPath(member.name)
        if inside.is_absolute() or ".." in inside.parts:
            shown = printable(member.name)
            raise UnreadableFile(f"the member '{shown}' points out of the archive")
        if member.issparse():
            raise UnreadableFile(f"the member '{printable(member.name)}' is a sparse file")
        if member.size < 0:  # of an extended header
            raise UnreadableFile(f"a member has the size {member.size}")
        if member.isfile() and not inside.name.startswith(".") and "." in inside.name:
            yield inside.parent, inside.name, (member.offset_data, member.size)
        archive.members = []  # it would keep them all


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _rows_of(group: list[_Member]) -> list[dict[str, tuple[int, int]]]:
    """The rows, {extension: (offset, size)}, in members whose names are the same up to the first
    dot.

    By the convention of webdataset they are one row, and "a.mask.png" is its "mask.png". Where none
    of them is then a column, nor has the name of one ("a.source.png"), the names have dots: the
    extension is what follows the last one."""
    row = {name.partition(".")[2].lower(): place for _, name, place in group}
    if not row.keys().isdisjoint(TAR_COLUMNS) or any(plain_name(name) in MEMBERS for name in row):
        return [row]
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    for _, name, place in group:
        stem, _, extension = name.rpartition(".")
        rows.setdefault(stem, {})[extension.lower()] = place
    found = [row for row in rows.values() if not row.keys().isdisjoint(TAR_COLUMNS)]
    return found or [row]


def parse_json(text: bytes | str, kinds: tuple[type, ...] = (dict,)) -> Any:
    """JSON that holds one of `kinds`. Raises BadRow "bad_json"."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", one_line(error)) from None
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise BadRow("bad_json", f"expected {expected}, got {type(value).__name__}")
    return value
