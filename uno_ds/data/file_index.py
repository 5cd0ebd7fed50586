"""What was found in the files of a source when they were last opened, kept in the cache: a start
then looks at each file's size and times and opens none, and the places of rows in archives and json
lines are not searched again.

An entry is used only while size, times and inode of its file are those of then. The time at which
the system saw a file change cannot be set as its modification time can."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as tensors_of
from safetensors.numpy import save as bytes_of

from uno_ds.data.tables import default_cache
from uno_ds.files_on_disk import open_regular, read_regular, replace_text, replacing

FORMAT = 1
# Fewer files than these, and files of fewer bytes, are opened faster than an index is kept.
FEWEST_FILES, FEWEST_BYTES = 8, 64 * 1024
LARGEST_INDEX = 1024**3  # bytes
State = tuple[int, int, int, int]


@dataclass(frozen=True)
class Entry:
    """`columns`: those of the first row that have a value; None where it cannot be read."""

    rows: int
    columns: tuple[str, ...] | None


class FileIndex:
    """Entries of the files of one source, read from the cache; `save` writes them back."""

    def __init__(self, paths: Sequence[Path], cache: Path | None):
        names = [str(path.absolute()) for path in paths]
        digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
        self._path = (cache or default_cache()) / "indices" / f"{digest[:32]}.json"
        self._is_kept = len(paths) >= FEWEST_FILES
        self._is_changed = False
        self._entries: dict[str, tuple[State, Entry]] = {}
        if self._is_kept:
            # Damaged, of another version, or not there yet: it is made again.
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                self._entries = _parsed(json.loads(read_regular(self._path, LARGEST_INDEX)))

    def find(self, path: Path, seen: os.stat_result) -> Entry | None:
        """The entry of a file that is as it was."""
        state, entry = self._entries.get(str(path.absolute()), (None, None))
        return entry if state == _state(seen) else None

    def add(self, path: Path, seen: os.stat_result, entry: Entry) -> None:
        self._entries[str(path.absolute())] = _state(seen), entry
        self._is_changed = True

    def save(self) -> None:
        """Without effect where the cache cannot be written: the next start opens the files
        again."""
        if not (self._is_kept and self._is_changed):
            return
        files = {
            path: [*state, entry.rows, entry.columns]
            for path, (state, entry) in self._entries.items()
        }
        with contextlib.suppress(OSError, ValueError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._path, json.dumps({"format": FORMAT, "files": files}))


class LazyRows:
    """The rows of a file of known length that is opened when the first one is read."""

    def __init__(self, rows: int, open_file: Callable[[], Any]):
        self._rows = rows
        self._open = open_file
        self._file: Any = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._rows

    def read(self, index: int) -> Mapping[str, Any]:
        with self._lock:
            if self._file is None:
                self._file = self._open()
        return self._file.read(index)


def kept_arrays(
    path: Path, cache: Path | None, search: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What `search` finds in a file, from the cache if it was kept there. Raises what `search`
    raises, or OSError."""
    with open_regular(path) as stream:
        seen = os.fstat(stream.fileno())
    if seen.st_size < FEWEST_BYTES:
        return search()
    identity = FORMAT, str(path.absolute()), _state(seen)
    digest = hashlib.sha256(repr(identity).encode("utf-8", "surrogateescape")).hexdigest()
    kept = (cache or default_cache()) / "places" / f"{digest[:32]}.safetensors"
    with contextlib.suppress(OSError, SafetensorError), open_regular(kept) as stream:
        return _unpacked(tensors_of(stream.read()))
    found = search()
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as part, part.open("wb") as stream:
            stream.write(bytes_of(_packed(found)))
    return found


def _packed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Texts as their code points, under a name that says so: safetensors holds numbers only."""
    packed = {}
    for name, values in arrays.items():
        is_text = values.dtype.kind == "U"
        key = f"{name}:{values.dtype.str}" if is_text else name
        packed[key] = np.ascontiguousarray(values).view(np.uint32) if is_text else values
    return packed


def _unpacked(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    unpacked = {}
    for key, values in arrays.items():
        name, _, text_dtype = key.partition(":")
        unpacked[name] = values.view(text_dtype) if text_dtype else values
    return unpacked


def _state(seen: os.stat_result) -> State:
    return seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino


def _parsed(content: Mapping[str, Any]) -> dict[str, tuple[State, Entry]]:
    """Raises ValueError, TypeError or KeyError for what `save` did not write."""
    if content["format"] != FORMAT:
        raise ValueError("another format")
    entries = {}
    for path, (size, modified, changed, inode, rows, columns) in content["files"].items():
        if type(rows) is not int or rows < 0:
            raise ValueError("a number of rows is none")
        names = None if columns is None else tuple(map(str, columns))
        entries[path] = (size, modified, changed, inode), Entry(rows, names)
    return entries
