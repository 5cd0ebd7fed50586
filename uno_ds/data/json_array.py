"""The objects of a JSON array in a file, by their byte offsets."""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from uno_ds.data.tables import UnreadableFile
from uno_ds.files_on_disk import open_regular

# A string as a whole, or a bracket outside of strings.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}"]', re.DOTALL)
_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*(.?)", re.DOTALL)


def begins_array(path: Path) -> bool:
    """Whether the first character of a file opens an array. Raises OSError."""
    with open_regular(path) as stream:
        found = _START.match(stream.read(4096))
    return found is not None and found[1] == b"["


def array_spans(path: Path) -> np.ndarray:
    """int64 [rows, 2]: offset and length of each object of the array. Raises UnreadableFile or
    OSError."""
    with open_regular(path) as stream:
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return np.array(list(_objects(content)), dtype=np.int64).reshape(-1, 2)


def _objects(content: mmap.mmap) -> Iterator[tuple[int, int]]:
    depth, start = 0, 0
    for token in _TOKEN.finditer(content):
        kind = token[0]
        if kind == b'"':
            break  # a string that does not end
        if depth == 1 and kind not in (b"{", b"]"):
            raise UnreadableFile(f"the item at byte {token.start():,} of its array is no object")
        if kind in (b"{", b"["):
            if depth == 1:
                start = token.start()
            depth += 1
        elif kind in (b"}", b"]"):
            depth -= 1
            if depth == 1:
                yield start, token.end() - start
            if depth == 0:
                return
    raise UnreadableFile("its array breaks off at the end of the file")
