"""safetensors files by plain reads and writes: one range of bytes at a time, nothing mapped, nothing held.

A mapped file counts as resident memory of every rank that touches it, so that four ranks which read a checkpoint seem to
hold it four times, and are killed for it where memory is limited.

Layout (https://github.com/huggingface/safetensors): eight bytes of header length, little-endian; a JSON header of
{name: {dtype, shape, data_offsets}} and `__metadata__`; then the bytes of the tensors, without gaps.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from uno_ds.settings import SettingsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
_CHUNK = 16 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; its bytes are [start, end) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """The tensors of one file: headers at once, values when they are asked for, and only those."""

    def __init__(self, path: Path):
        """Raises SettingsError if the file is missing, cut short, or no safetensors file."""
        self.path = path
        try:
            self.entries, self.metadata = _read_header(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(
                str(path), f"is not a readable safetensors file: {_reason(error)}."
            ) from None

    def read(self, name: str) -> torch.Tensor:
        return self.read_flat(name, 0, math.prod(self.entries[name].shape)).view(
            self.entries[name].shape
        )

    def read_flat(self, name: str, start: int, count: int) -> torch.Tensor:
        """[count]: values `start` to `start + count` of the flattened tensor."""
        entry = self.entries[name]
        values = torch.empty(count, dtype=entry.dtype)
        first = entry.start + start * entry.dtype.itemsize
        assert entry.start <= first <= first + values.nbytes <= entry.end
        with _reading(self.path) as stream:
            stream.seek(first)
            _fill(stream, _bytes_of(values), self.path)
        return values

    def digest(self, name: str) -> str:
        """Hash of dtype, shape and bytes of a tensor as they are in the file."""
        entry = self.entries[name]
        result = hashlib.blake2b(
            f"{_NAMES[entry.dtype]}{list(entry.shape)}".encode(), digest_size=16
        )
        _hash_range(self.path, entry.start, entry.end, result)
        return result.hexdigest()


def digest_of(path: Path) -> str:
    """Hash of a file's bytes, as `write_tensors` returns it."""
    result = new_digest()
    _hash_range(path, 0, path.stat().st_size, result)
    return result.hexdigest()


def new_digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
    digest: Any = None,
) -> None:
    """Writes a file of `layout`'s names, dtypes and shapes: header first, then each of `tensors`, in that order, as it comes.

    Written beside and renamed when it is whole and on the disk. `digest` is updated with every byte. Raises SettingsError
    if there is no space, or another reason not to write.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb", buffering=0) as stream:
            _append(stream, _header(layout, metadata), digest)
            for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
                assert tuple(tensor.shape) == tuple(shape), (
                    f"{name}: {list(tensor.shape)} instead of {list(shape)}"
                )
                # A tensor of another dtype is converted here, so that only one at a time is held in both.
                _append(stream, _bytes_of(tensor.detach().to("cpu", dtype).contiguous()), digest)
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise SettingsError(str(path), f"cannot be written: {_reason(error)}.") from None
    finally:
        beside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renames within the folder last through a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    with _reading(path) as stream:
        size, opening = os.fstat(stream.fileno()).st_size, stream.read(8)
        length = int.from_bytes(opening, "little")
        if len(opening) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("its header is longer than the file")
        text = bytearray(length)
        _fill(stream, memoryview(text), path)
    header = json.loads(text)
    metadata = header.pop("__metadata__", {})
    entries, expected = {}, 0
    for name, given in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = given["data_offsets"]
        shape = tuple(given["shape"])
        if given["dtype"] not in DTYPES:
            raise ValueError(f"{name} has the unknown dtype {given['dtype']}")
        dtype = DTYPES[given["dtype"]]
        if (
            start != expected
            or any(type(side) is not int or side < 0 for side in shape)
            or end - start != math.prod(shape) * dtype.itemsize
        ):
            raise ValueError(f"the bytes of {name} do not follow from its shape")
        expected = end
        entries[name] = Entry(dtype, shape, 8 + length + start, 8 + length + end)
    if 8 + length + expected != size:
        raise ValueError(f"it has {size} bytes where its header promises {8 + length + expected}")
    return entries, metadata


def _reading(path: Path) -> BinaryIO:
    # Unbuffered: values go from the system's cache straight into the tensor.
    return path.open("rb", buffering=0)


def _fill(stream: BinaryIO, target: memoryview, path: Path) -> None:
    # One call reads at most 2 GB.
    while target:
        count = stream.readinto(target)
        if not count:
            raise SettingsError(str(path), "became shorter while it was read.")
        target = target[count:]


def _append(stream: BinaryIO, content: memoryview | bytes, digest: Any) -> None:
    content = memoryview(content)
    while content:
        written = stream.write(content[:_CHUNK])
        if digest is not None:
            digest.update(content[:written])
        content = content[written:]


def _hash_range(path: Path, start: int, end: int, digest: Any) -> None:
    buffer = memoryview(bytearray(min(_CHUNK, end - start)))
    with _reading(path) as stream:
        stream.seek(start)
        while start < end:
            part = buffer[: end - start]
            _fill(stream, part, path)
            digest.update(part)
            start += len(part)


def _bytes_of(values: torch.Tensor) -> memoryview:
    return memoryview(values.reshape(-1).view(torch.uint8).numpy())


def _reason(error: Exception) -> str:
    return (
        error.strerror
        if isinstance(error, OSError) and error.strerror
        else str(error) or type(error).__name__
    )
