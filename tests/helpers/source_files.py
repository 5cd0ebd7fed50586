"""Small data files, as several programs write them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from small_runs import encoded, picture

from uno_ds.data.sources import Source


def captions(source: Source) -> list[str]:
    """Of all rows, one each."""
    rng = np.random.default_rng(0)
    return [source.read(index, rng).captions[0] for index in range(len(source))]


def table(*words: str) -> pa.Table:
    rows = [{"image": encoded(picture()), "caption": word} for word in words]
    return pa.Table.from_pylist(rows)


def parquet(path: Path, *words: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(*words), path)
    return path


def arrow(path: Path, *words: str) -> Path:
    rows = table(*words)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=4)
    return path


def archive(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in dict(members).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path
