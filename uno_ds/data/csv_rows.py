"""Rows of a CSV file with a header, such as the metadata.csv of an image folder. Every value is a
text; an empty field has none."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv as arrow_csv

from uno_ds.data.tables import UnreadableFile, row_of
from uno_ds.files_on_disk import read_regular

METADATA = "metadata.csv"
LARGEST_CSV = 2 * 1024**3  # bytes of a file, which is held in memory


class CsvRows:
    """Raises UnreadableFile, pa.ArrowException or OSError."""

    def __init__(self, path: Path):
        content = read_regular(path, LARGEST_CSV)
        names = _header(content)
        table = arrow_csv.read_csv(
            pa.BufferReader(content),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        batches = table.combine_chunks().to_batches()
        self._batch = batches[0] if batches else None

    def __len__(self) -> int:
        return self._batch.num_rows if self._batch is not None else 0

    def read(self, index: int) -> Mapping[str, Any]:
        assert self._batch is not None, "a row of an empty file"
        return row_of(self._batch, index)


def _header(content: bytes) -> list[str]:
    try:
        text = content[: 1 << 20].decode("utf-8-sig", "ignore")
        names = next(csv.reader(io.StringIO(text)), [])
    except csv.Error as error:
        raise UnreadableFile(f"its header cannot be read: {error}") from None
    if len(set(names)) != len(names) or not all(names):
        raise UnreadableFile("its header has a column without a name, or a name twice")
    return names
