"""Rows of parquet and arrow files, read with pyarrow alone, which ignores what another library
wrote into a schema's metadata.

Parquet is unpacked once, into chunks of few rows in a cache, since reading one of its rows costs a
whole row group. An arrow file is mapped. No row is returned before it is validated in full: offsets
of a damaged file point outside of its buffers, and following them kills the process."""

import fcntl
import hashlib
import itertools
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from uno_ds.files_on_disk import open_regular, read_regular

# A row is read with its whole chunk. A chunk holds at least one row.
CHUNK_BYTES, CHUNK_ROWS = 256 * 1024, 64
# Lists above 2 GiB cannot be read from parquet in one piece, and a dictionary makes few bytes of a
# file many in memory.
BATCH_BYTES, BATCH_ROWS = 32 * 1024**2, 64
FORMAT = 1  # of the cache
FOOTER_BYTES, CHECKSUM_BYTES = 64 * 1024, 32


class UnreadableFile(Exception):
    """A file that cannot be opened as what its suffix says; the text is one line."""


class ArrowRows:
    """The mapped record batches of an arrow file. Raises UnreadableFile, pa.ArrowException or
    OSError."""

    def __init__(self, path: Path):
        self._path = path
        self._batches = list(_batches(_mapped(path)))
        for batch in self._batches:
            batch.validate(full=True)
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: int) -> Mapping[str, Any]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[which]
        return row_of(batch, index - int(self._ends[which]) + batch.num_rows)

    def __reduce__(self):
        return type(self), (self._path,)


class UnpackedRows:
    """A file that `unpack` wrote, read chunk by chunk with plain reads."""

    def __init__(self, folder: Path):
        self._path = folder / "chunks"
        written = read_regular(folder / "index")
        index, checksum = written[:-CHECKSUM_BYTES], written[-CHECKSUM_BYTES:]
        if checksum != _checksum(index):
            raise ValueError("the index is damaged")
        self._offsets, self._starts = np.frombuffer(index, dtype="<i8").reshape(2, -1)
        if self._offsets[-1] != self._path.stat().st_size:
            raise ValueError("the index does not fit the chunks")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> Mapping[str, Any]:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        begin, end = self._offsets[which : which + 2]
        with open_regular(self._path) as stream:
            stream.seek(begin)
            data = stream.read(end - begin)
        batch = pa.ipc.open_stream(data).read_next_batch()
        batch.validate(full=True)
        return row_of(batch, index - int(self._starts[which]))


def open_parquet(path: Path, cache: Path | None) -> UnpackedRows:
    """Unpacks the file unless it has been. Raises UnreadableFile, pa.ArrowException or OSError."""
    return _unpacked(path, _parquet_batches(path), cache)


def open_arrow(path: Path, cache: Path | None) -> ArrowRows | UnpackedRows:
    """The stream format as well as the file format. Raises UnreadableFile, pa.ArrowException or
    OSError.

    Validation touches validity bits, offsets and strings, and of encoded images nothing. A
    compressed file is unpacked: mapping it would hold all of it in memory."""
    whole = _mapped(path)
    first = next(_batches(whole), None)
    if first is None or _lies_in(first, whole):
        return ArrowRows(path)
    return _unpacked(path, _batches(whole), cache)


def parquet_columns(path: Path) -> list[str]:
    """Raises pa.ArrowException or OSError."""
    open_regular(path).close()
    return pq.read_schema(path).names


def row_of(batch: pa.RecordBatch, index: int) -> Mapping[str, Any]:
    return batch.slice(index, 1).to_pylist(maps_as_pydicts="lossy")[0]


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            if group.num_rows:
                fitting = BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
                rows = min(BATCH_ROWS, max(1, fitting))
                yield from file.iter_batches(rows, row_groups=[number], use_threads=False)


def _batches(whole: pa.Buffer) -> Iterator[pa.RecordBatch]:
    if whole[:6] != b"ARROW1":
        yield from pa.ipc.open_stream(whole)
        return
    reader = pa.ipc.open_file(whole)
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


def _mapped(path: Path) -> pa.Buffer:
    with open_regular(path) as stream:
        if not os.fstat(stream.fileno()).st_size:
            raise UnreadableFile("the file is empty")
    # The buffer outlives the file object, which would hold a descriptor.
    with pa.memory_map(str(path)) as source:
        return source.read_buffer()


def _lies_in(batch: pa.RecordBatch, whole: pa.Buffer) -> bool:
    """False for a batch that was decompressed."""
    end = whole.address + whole.size
    for column in batch.columns:
        for buffer in column.buffers():
            if buffer and buffer.size and not whole.address <= buffer.address < end:
                return False
    return True


def _unpacked(path: Path, batches: Iterable[pa.RecordBatch], cache: Path | None) -> UnpackedRows:
    cache = cache or default_cache()
    key = _key(path)
    folder = cache / key
    try:
        return UnpackedRows(folder)
    except (OSError, ValueError):
        pass  # not there yet, or damaged
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{key}.lock") as alone:
        try:
            return UnpackedRows(folder)  # another rank wrote it while this one waited
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
        for left in cache.glob(f".{key}.*") if alone else ():
            shutil.rmtree(left, ignore_errors=True)
        part = cache / f".{key}.{socket.gethostname()}.{os.getpid()}"
        with _writing(cache):
            part.mkdir(exist_ok=True)
        try:
            _write_chunks(part, batches)
            with _writing(cache):
                _publish(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return UnpackedRows(folder)


def _publish(part: Path, folder: Path) -> None:
    try:
        os.rename(part, folder)
    except OSError:
        if not folder.is_dir():  # else, without locks, another rank was faster
            raise


def _write_chunks(folder: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """`chunks`: arrow streams of one record batch each; `index`: their offsets, then their first
    rows, as int64, each with its end, and a checksum."""
    offsets, starts = [0], [0]
    with _writing(folder):
        stream = (folder / "chunks").open("wb")
    with stream:
        for chunk in itertools.chain.from_iterable(map(_chunks, batches)):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, chunk.schema) as writer:
                writer.write_batch(chunk)
            data = sink.getvalue()
            with _writing(folder):
                stream.write(data)
            offsets.append(offsets[-1] + data.size)
            starts.append(starts[-1] + chunk.num_rows)
        with _writing(folder):
            stream.flush()
    index = np.array([offsets, starts], dtype="<i8").tobytes()
    with _writing(folder):
        (folder / "index").write_bytes(index + _checksum(index))


def _checksum(index: bytes) -> bytes:
    return hashlib.sha256(index).digest()


def _chunks(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    batch.validate(full=True)
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    plain = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
    fitting = CHUNK_BYTES * plain.num_rows // max(1, plain.nbytes)
    rows = min(CHUNK_ROWS, max(1, fitting))
    for start in range(0, plain.num_rows, rows):
        yield plain.slice(start, rows)


def default_cache() -> Path:
    """A folder of its own in the cache of Hugging Face `datasets`, wherever its variables of the
    environment put that."""
    if given := os.environ.get("HF_DATASETS_CACHE"):
        return Path(given).expanduser() / "uno_ds"
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Path(home).expanduser() / "datasets" / "uno_ds"


def _key(path: Path) -> str:
    """Changes with the file: the time at which the system saw it change cannot be set as its
    modification time can."""
    with open_regular(path) as stream:
        found = os.fstat(stream.fileno())
        stream.seek(max(0, found.st_size - FOOTER_BYTES))
        footer = stream.read(FOOTER_BYTES)
    times = found.st_mtime_ns, found.st_ctime_ns
    seen = FORMAT, str(path.resolve()), found.st_size, times, hashlib.sha256(footer).hexdigest()
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:32]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Separates a full or read-only cache from a damaged file: pyarrow raises OSError for
    either."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnreadableFile(f"cannot be unpacked into '{folder}': {reason}") from None


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Waits for the other ranks of this machine; whether the file system has locks."""
    with _writing(path.parent):
        stream = path.open("w")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
