"""safetensors files by plain reads and writes of byte ranges; no file is mapped into memory.

A mapped file counts as resident memory of every rank that touches it: four ranks that read a
checkpoint appear to hold it four times, and are killed where memory is limited.

Layout (https://github.com/huggingface/safetensors): eight bytes of header length, little-endian; a
JSON header of {name: {dtype, shape, data_offsets}} and `__metadata__`; then the bytes of the
tensors, without gaps."""

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uno_ds.files_on_disk import open_regular, replacing
from uno_ds.json_text import read_json, shown
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Weights of every floating dtype are read, and bf16 is written.
_LARGEST_VALUE = torch.finfo(torch.bfloat16).max
_LONGEST_HEADER = 100_000_000
_MOST_SIDES = 64
_MOST_VALUES = 2**63
_CHUNK = 16 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; its bytes are [start, end) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """The tensors of one file. The constructor reads the header; `read` reads the values of one
    tensor."""

    def __init__(self, path: Path):
        """Raises SettingsError if the file is missing, truncated, or no safetensors file, or if a
        name occurs twice."""
        self.path = path
        try:
            self.entries, self.metadata = _read_header(path)
        except (OSError, ValueError) as error:
            raise SettingsError(
                str(path), f"is not a readable safetensors file: {_reason(error)}."
            ) from None

    def read(self, name: str) -> torch.Tensor:
        shape = self.entries[name].shape
        return self.read_flat(name, 0, math.prod(shape)).view(shape)

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
        """Hash of dtype, shape and bytes of a tensor as stored in the file."""
        entry = self.entries[name]
        description = f"{DTYPE_NAMES[entry.dtype]}{list(entry.shape)}"
        result = hashlib.blake2b(description.encode(), digest_size=16)
        _hash_range(self.path, entry.start, entry.end, result)
        return result.hexdigest()


def is_plain_float(dtype: torch.dtype) -> bool:
    """Whether values of this dtype are weights without a scale; those of fp8 need one."""
    return dtype.is_floating_point and dtype.itemsize > 1


def nonfinite_values(values: torch.Tensor) -> int:
    """How many of a floating tensor's values are NaN, infinite, or infinite in bf16."""
    if not values.numel():
        return 0
    largest = min(_LARGEST_VALUE, torch.finfo(values.dtype).max)
    # One pass; a comparison with NaN is false.
    low, high = torch.aminmax(values)
    if low >= -largest and high <= largest:
        return 0
    return int((~(values.abs() <= largest)).sum())


def digest_of(path: Path) -> str:
    """Hash of a file's bytes, as `write_tensors` returns it."""
    result = new_digest()
    _hash_range(path, 0, path.stat().st_size, result)
    return result.hexdigest()


def new_digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def write_tensors(
    path: Path,
    specs: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
    digest: Any = None,
) -> None:
    """Writes a file of `specs`'s names, dtypes and shapes: header first, then each of `tensors`,
    in that order, as it comes.

    The file appears when it is complete and on the disk. `digest` is updated with every byte.
    Raises SettingsError if writing fails.
    """
    try:
        with replacing(path, synced=True) as partial, partial.open("wb", buffering=0) as stream:
            _append(stream, _header(specs, metadata), digest)
            for (name, (dtype, shape)), tensor in zip(specs.items(), tensors, strict=True):
                assert tuple(tensor.shape) == tuple(shape), (
                    f"{name}: {list(tensor.shape)} instead of {list(shape)}"
                )
                # Converted here, so that only one tensor at a time is held in both dtypes.
                converted = tensor.detach().to("cpu", dtype).contiguous()
                _append(stream, _bytes_of(converted), digest)
    except OSError as error:
        raise SettingsError(str(path), f"cannot be written: {_reason(error)}.") from None


def sync_folder(folder: Path) -> None:
    """Makes renames within the folder last through a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(
    specs: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    with _reading(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        opening = stream.read(8)
        length = int.from_bytes(opening, "little")
        if len(opening) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("its header is longer than the file")
        text = bytearray(length)
        _fill(stream, memoryview(text), path)
    header = read_json(bytes(text))
    if not isinstance(header, dict):
        raise ValueError("its header holds no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(value) is not str for value in metadata.values()):
        raise ValueError("its __metadata__ is not a mapping of names to texts")
    entries = [(name, _entry(name, given, 8 + length)) for name, given in header.items()]
    entries.sort(key=lambda item: (item[1].start, item[1].end))
    expected = 8 + length
    for name, entry in entries:
        if entry.start != expected:
            raise ValueError(
                f"the bytes of {shown(name)} do not begin where those of the tensor before end"
            )
        expected = entry.end
    if expected != size:
        raise ValueError(f"it has {size} bytes where its header states {expected}")
    return dict(entries), metadata


def _entry(name: str, given: Any, begin: int) -> Entry:
    """A tensor's entry in the header; `begin`: where the bytes of the tensors begin. Raises
    ValueError.
    """
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(given, dict) or any(field not in given for field in fields):
        raise ValueError(f"{shown(name)} lacks one of {', '.join(fields)}")
    dtype, shape, offsets = (given[field] for field in fields)
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of {shown(name)} is not a text")
    if dtype not in DTYPES:
        raise ValueError(
            f"{shown(name)} has the unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}"
        )
    if not _are_counts(shape) or len(shape) > _MOST_SIDES:
        raise ValueError(f"the shape of {shown(name)} is not a list of at most {_MOST_SIDES} sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"the data_offsets of {shown(name)} are not two whole numbers")
    start, end = offsets
    # Sides of 0 left out: torch multiplies the others too.
    if math.prod(side or 1 for side in shape) >= _MOST_VALUES:
        raise ValueError(f"the shape of {shown(name)} is beyond what a tensor can have")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"the bytes of {shown(name)} do not follow from its shape")
    return Entry(DTYPES[dtype], tuple(shape), begin + start, begin + end)


def _are_counts(values: Any) -> bool:
    """Whether it is a list of whole numbers from 0 on that fit into 63 bits."""
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < _MOST_VALUES for value in values
    )


def _reading(path: Path) -> io.FileIO:
    # Unbuffered: values go from the system's cache straight into the tensor.
    stream = open_regular(path, buffering=0)
    assert isinstance(stream, io.FileIO), "an unbuffered binary file"
    return stream


def _fill(stream: io.FileIO, target: memoryview, path: Path) -> None:
    # One call reads at most 2 GB.
    while target:
        count = stream.readinto(target)
        if not count:
            raise SettingsError(str(path), "became shorter while it was read.")
        target = target[count:]


def _append(stream: io.FileIO, content: memoryview | bytes, digest: Any) -> None:
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
    return values.reshape(-1).view(torch.uint8).numpy().data


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
