"""Rows of data files as people have them: small pictures, and a source over them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from uno_ds.data.images import BadRow
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.settings import build


def opened(path: Path, **values) -> Source:
    settings = build(SourceSettings, {"path": str(path), **values})
    return Source(settings, cache=path.parent / "cache")


def read(source: Source, index: int = 0):
    return source.read(index, np.random.default_rng(0))


def cause(source: Source, index: int = 0) -> str:
    with pytest.raises(BadRow) as caught:
        read(source, index)
    return caught.value.cause


def parquet(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def lines(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as stream:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            stream.addfile(entry, io.BytesIO(data))
    return path


# Columns of a text-to-image row, and the captions that it holds.
