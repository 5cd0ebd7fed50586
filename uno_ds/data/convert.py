"""Writing the usable rows of a source as parquet, under the column names of the documentation."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from uno_ds.data.files import one_line
from uno_ds.data.images import BadRow
from uno_ds.data.layouts import get_layout
from uno_ds.data.prepared import PreparedSource
from uno_ds.data.source_checks import BadExample
from uno_ds.data.sources import Source
from uno_ds.data.streamed import StreamedSource
from uno_ds.files_on_disk import replacing
from uno_ds.settings import SettingsError

# A row is read with its whole row group.
ROWS_PER_GROUP = 64


@dataclass(eq=False)
class Converted:
    """Rows and files that were written, and the rows that were left out."""

    written: int = 0
    files: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    first_of_cause: dict[str, BadExample] = field(default_factory=dict)


def convert(source: Source, folder: Path, rows_per_file: int) -> Converted:
    """Writes 00000.parquet, 00001.parquet, ... with images as the bytes that the source has. Raises
    SettingsError if the folder holds something or cannot be written, or the layout has no written
    form."""
    if isinstance(source, StreamedSource):
        raise source.incomplete()
    layout = get_layout(source.layout)
    if not layout.written_columns or isinstance(source, PreparedSource):
        raise SettingsError(
            "PATH", f"'{source.settings.path}' holds rows ({layout.name}) that cannot be written."
        )
    schema = pa.schema(layout.written_columns)
    done = Converted()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise SettingsError("OUT", f"'{folder}' is not empty; give a new folder.")
        rows = _written_rows(source, done)
        while group := _next(rows, rows_per_file):
            path = folder / f"{done.files:05d}.parquet"
            with replacing(path, synced=True) as partial:
                table = pa.Table.from_pylist(group, schema=schema)
                pq.write_table(table, partial, row_group_size=ROWS_PER_GROUP)
            done.files += 1
            done.written += len(group)
    except OSError as error:
        raise SettingsError("OUT", f"'{folder}' cannot be written: {one_line(error)}.") from None
    return done


def _written_rows(source: Source, done: Converted) -> Iterator[dict[str, Any]]:
    layout = get_layout(source.layout)
    for index in range(len(source)):
        try:
            yield layout.written(source.read_encoded(index))
        except BadRow as error:
            done.causes[error.cause] += 1
            done.first_of_cause.setdefault(error.cause, BadExample.of(source, index, error))


def _next(rows: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(rows, count))
