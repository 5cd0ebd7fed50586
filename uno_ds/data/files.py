"""Rows of data files by index: parquet and arrow through Hugging Face `datasets`, webdataset tar and json lines by offset.

Every file is opened on its own, so that a broken one costs its own rows only. A row is a dictionary of raw columns:
images stay encoded bytes.
"""

import bisect
import glob
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from uno_ds.data.images import BadRow
from uno_ds.settings import printable

SUFFIXES = (".parquet", ".arrow", ".tar", ".jsonl", ".ndjson")
TAR_IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff")


class RowFile(Protocol):
    """One data file. `read` raises BadRow, or anything at all if the file changed under it."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Mapping[str, Any]: ...


class UnreadableFile(Exception):
    """A file that cannot be opened as what its suffix says; the text is one line."""


class Files:
    """The readable files of a list, as one sequence of rows. `unreadable` maps the others to the reason, and `lost` those that
    went away or became shorter since; their rows are bad from then on."""

    def __init__(self, paths: list[Path], cache: Path | None = None):
        self.paths: list[Path] = []
        self.lost: dict[str, str] = {}
        self._sizes: list[int] = []
        self.unreadable: dict[str, str] = {}
        self._files: list[RowFile] = []
        self._ends: list[int] = []
        for path in paths:
            try:
                file = open_rows(path, cache)
            except UnreadableFile as error:
                self.unreadable[str(path)] = str(error)
                continue
            self.paths.append(path)
            self._sizes.append(path.stat().st_size)
            self._files.append(file)
            self._ends.append(len(self) + len(file))

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
            row = self._files[which].read(index - start)
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
        # Parquet is read from the cache of `datasets`. A look at the size costs microseconds; reading a mapped file beyond its
        # end would kill the process.
        if path.suffix == ".parquet":
            return
        if str(path) not in self.lost:
            try:
                size = path.stat().st_size
                if size >= self._sizes[which]:
                    return
                reason = f"it has {size:,} bytes instead of {self._sizes[which]:,}"
            except OSError as error:
                reason = error.strerror or str(error)
            self.lost[str(path)] = reason
        raise BadRow("lost_file", f"{path}: {self.lost[str(path)]}")


def find(path: str) -> list[Path]:
    """Data files that a file, a folder (searched to any depth) or a glob names, sorted; hidden ones are left out."""
    given = Path(path).expanduser()
    if given.is_file():
        return [given]
    if given.is_dir():
        found = [
            (item, item.relative_to(given).parts)
            for item in given.rglob("*")
            if item.suffix in SUFFIXES and item.is_file()
        ]
        return sorted(
            item for item, parts in found if not any(part.startswith(".") for part in parts)
        )
    return sorted(
        item
        for item in map(Path, glob.glob(str(given), recursive=True))
        if item.suffix in SUFFIXES and item.is_file()
    )


def open_rows(path: Path, cache: Path | None = None) -> RowFile:
    """Opens one file by its suffix. Raises UnreadableFile."""
    kinds = {
        ".parquet": lambda: _Table(_parquet(path, cache)),
        ".arrow": lambda: _Table(_arrow(path, cache)),
        ".tar": lambda: _Tar(path),
    }
    if path.suffix not in SUFFIXES:
        raise UnreadableFile(f"the suffix is none of {', '.join(SUFFIXES)}")
    try:
        return kinds.get(path.suffix, lambda: _Lines(path))()
    except UnreadableFile:
        raise
    except Exception as error:  # each library has its own ways to fail on broken bytes
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) else None
        raise UnreadableFile(one_line(cause or error)) from None


def one_line(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)


def _parquet(path: Path, cache: Path | None) -> datasets.Dataset:
    pq.read_schema(path)  # fails at once on a truncated file, before `datasets` logs and copies
    return _load("parquet", path, cache)


def _arrow(path: Path, cache: Path | None) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_file(
            str(path)
        )  # the stream format of `datasets` itself is mapped, not copied
    except pa.ArrowInvalid:
        return _load("arrow", path, cache)


def _load(kind: str, path: Path, cache: Path | None) -> datasets.Dataset:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        escaped = glob.escape(str(path.absolute()))
        return datasets.load_dataset(
            kind,
            data_files={"train": [escaped]},
            split="train",
            cache_dir=str(cache) if cache else None,
        )
    finally:
        if shown:
            datasets.enable_progress_bars()


class _Table:
    """A table of `datasets`, without its image decoding."""

    def __init__(self, table: datasets.Dataset):
        # The arrow format gives plain columns: an Image feature stays the {bytes, path} it is stored as.
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return self._table.num_rows

    def read(self, index: int) -> Mapping[str, Any]:
        return self._table[index].to_pylist()[0]


class _Lines:
    """A json lines file, by the byte offsets of its non-empty lines."""

    def __init__(self, path: Path):
        self._path, spans, position = path, [], 0
        with path.open("rb") as stream:
            for line in stream:
                if line.strip():
                    spans.append((position, len(line)))
                position += len(line)
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, index: int) -> Mapping[str, Any]:
        start, length = self._spans[index]
        with self._path.open("rb") as stream:
            stream.seek(start)
            return parse_json(stream.read(length))


class _Tar:
    """A webdataset archive: members with the same path up to the first dot of the name are one row.

    Read by the offsets of its members and not through `datasets`, which loses the archive for one broken member.
    """

    def __init__(self, path: Path):
        self._path = path
        self._rows: list[dict[str, tuple[int, int]]] = []
        last = None
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                inside = PurePosixPath(member.name)
                if inside.is_absolute() or ".." in inside.parts:
                    raise UnreadableFile(f"the member '{member.name}' points out of the archive")
                stem, dot, extension = inside.name.partition(".")
                if not member.isfile() or not dot or not stem:
                    continue
                if last != (key := (inside.parent, stem)):
                    last = key
                    self._rows.append({})
                self._rows[-1][extension.lower()] = (member.offset_data, member.size)
            end = archive.offset
        with path.open("rb") as stream:
            # tarfile takes half a header for the end; a whole archive has a block of zeros there, or (some writers) nothing.
            stream.seek(end)
            if (block := stream.read(tarfile.BLOCKSIZE)) and block != bytes(tarfile.BLOCKSIZE):
                raise UnreadableFile(f"the archive is cut or broken at byte {end}")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Mapping[str, Any]:
        members, row = self._rows[index], {}
        with self._path.open("rb") as stream:
            for extension, (offset, size) in members.items():
                stream.seek(offset)
                data = stream.read(size)
                if len(data) < size:
                    raise BadRow("bad_row", f"{self._path.name} ends inside a member")
                if extension in TAR_IMAGES:
                    row["image"] = data
                elif extension == "txt":
                    row["caption"] = data.decode("utf-8-sig", "replace")
                elif extension == "json":
                    content = parse_json(data)
                    row.update((key, value) for key, value in content.items() if key not in row)
        return row


def parse_json(text: bytes | str, kinds: tuple[type, ...] = (dict,)) -> Any:
    """JSON that holds one of `kinds`. Raises BadRow "bad_json"."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", one_line(error)) from None
    if not isinstance(value, kinds):
        raise BadRow(
            "bad_json",
            f"expected {' or '.join(kind.__name__ for kind in kinds)}, got {type(value).__name__}",
        )
    return value
