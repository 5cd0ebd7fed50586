"""Prepared sources: rows whose images were encoded and whose texts were tokenised before training.

A folder holds `prepared.json`, the manifest (what the rows were made from and how), and shards
00000.parquet, 00001.parquet, ... with a row for each row of the source, in its order, the unusable
ones too: training then makes the same random choices among the same rows as without preparation.
"""

import bisect
import functools
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from uno_ds.data.captions import CaptionReader
from uno_ds.data.examples import Example, PreparedImage
from uno_ds.data.files import named_after, one_line
from uno_ds.data.images import BadRow
from uno_ds.data.layouts import AUTO, LAYOUTS, get_layout
from uno_ds.data.recognition import Reading
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.files_on_disk import open_regular, read_regular, replace_text, replacing
from uno_ds.sequence.composition import Encoded, grids_of, queries_of
from uno_ds.settings import SettingsError, printable

MANIFEST, FORMAT = "prepared.json", 1
LARGEST_MANIFEST = 64 * 1024**2  # bytes; it names each unreadable file
# Fields of the manifest that are compared as they are.
FIELDS = (
    "format",
    "source",
    "files",
    "layout",
    "rows",
    "rows_per_shard",
    "dtype",
    "caption_keys",
    "columns",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A row is read by its group, so groups are small; each costs some hundred bytes of the footer.
GROUP_BYTES, GROUP_ROWS = 64 * 1024, 64
# Of keys that came later: the value with which folders were prepared whose manifest lacks them.
EARLIER_VALUES = {"objective.regression_target_norm": "none"}
# Of every row, whatever its layout: why it cannot be used.
CAUSE_COLUMNS = (("cause", pa.string()), ("detail", pa.string()))


def is_prepared(path: str) -> bool:
    return (Path(path).expanduser() / MANIFEST).is_file()


class PreparedSource(Source):
    """A prepared folder in the place of the source it was made from. Raises SettingsError if it is
    incomplete."""

    def __init__(self, settings: SourceSettings):
        self.settings = settings
        self.folder = Path(settings.path).expanduser()
        self.name = printable(settings.name or self.folder.name)
        self._reader = CaptionReader(settings.caption_keys)
        self.manifest = read_manifest(self.folder)
        self.layout: str = self.manifest["layout"]
        self.unreadable_files: dict[str, str] = self.manifest["unreadable_files"]
        if settings.layout not in (AUTO, self.layout):
            raise SettingsError(
                "layout",
                f"is {settings.layout}, but '{self.folder}' was prepared from a source of layout "
                f"{self.layout}.",
            )
        for key in ("caption_keys", "columns"):
            given, prepared = getattr(settings, key), self.manifest.get(key)
            if given not in (None, prepared):
                raise SettingsError(
                    key,
                    f"are {_show(given)}, but '{self.folder}' was prepared with "
                    f"{_show(prepared)}; prepare it again.",
                )
        self._shards = [
            _Shard(shard_path(self.folder, number), len(rows))
            for number, rows in enumerate(shards(self.manifest))
        ]

    def __len__(self) -> int:
        return self.manifest["rows"]

    def locate(self, index: int) -> tuple[Path, int]:
        shard, place = divmod(index, self.manifest["rows_per_shard"])
        return self._shards[shard].path, place

    def columns(self, index: int) -> list[str]:
        return []

    def lacking(self, index: int) -> str:
        return ""

    @functools.cached_property
    def reading(self) -> Reading:
        return Reading(self.layout, len(self))

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Compares what the rows were encoded with, key by key of the recipe. Raises SettingsError
        for the first difference. A key that is None in `recipe` is not compared.
        """
        layout = get_layout(self.layout)
        for key, wanted in recipe.items():
            given = _value_of(self.manifest["recipe"], key)
            if wanted is not None and not layout.serves(key, given, wanted):
                raise self.error(
                    f"it was prepared with {key} {_show(given)}, but the recipe has "
                    f"{_show(wanted)}; prepare it again"
                )

    def read(self, index: int, rng: np.random.Generator) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number, place = divmod(index, self.manifest["rows_per_shard"])
        shard = self._shards[number]
        try:
            row = named_after(shard.path)(shard.read, place)
        except Exception as error:  # the file was changed meanwhile, or the disk fails
            raise BadRow("bad_row", f"{shard.path.name}: {one_line(error)}") from None
        _raise_stored(row)
        key = f"{self.name}:{index}"
        return get_layout(self.layout).decode(key, row, self._load, rng)

    def _load(self, stored: Mapping[str, Any]) -> PreparedImage:
        _raise_stored(stored)
        latent = target = picture = None
        if stored["latent"] is not None:
            values = self._values(stored["latent"]).reshape(stored["latent_shape"])
            latent = Encoded(values, tuple(stored["latent_grid"]))
        if stored["target"] is not None:
            queries = queries_of(grids_of(self.manifest["recipe"]["sequence.metaquery_grid"]))
            values = self._values(stored["target"]).reshape(queries, -1)
            target = Encoded(values, tuple(stored["target_grid"]))
        if stored["picture"] is not None:
            picture = Image.open(io.BytesIO(stored["picture"]), formats=("PNG",))
        return PreparedImage(latent, target, picture)

    def _values(self, data: bytes) -> np.ndarray:
        stored = torch.frombuffer(bytearray(data), dtype=DTYPES[self.manifest["dtype"]])
        return stored.float().numpy()


class _Shard:
    """One file, of which only the footer stays in memory; rows are read by row group."""

    def __init__(self, path: Path, rows: int):
        self.path = path
        try:
            open_regular(path).close()
            self._footer = pq.read_metadata(path)
        except FileNotFoundError:
            raise SettingsError(
                "path",
                f"'{path.parent}' is incomplete: {path.name} is missing; run prepare_data.py again "
                "with the same arguments, it resumes where it stopped.",
            ) from None
        except (OSError, pa.ArrowException) as error:
            raise SettingsError("path", f"'{path}' is not readable: {one_line(error)}") from None
        if self._footer.num_rows != rows:
            raise SettingsError(
                "path",
                f"'{path}' holds {self._footer.num_rows} rows instead of {rows}; it is not of this "
                "preparation.",
            )
        groups = range(self._footer.num_row_groups)
        sizes = [self._footer.row_group(group).num_rows for group in groups]
        self._ends = list(itertools.accumulate(sizes))

    def read(self, index: int) -> Mapping[str, Any]:
        group = bisect.bisect_right(self._ends, index)
        first = self._ends[group - 1] if group else 0
        with pq.ParquetFile(
            self.path, metadata=self._footer, page_checksum_verification=True
        ) as file:
            rows = file.read_row_group(group, use_threads=False)
        return rows.slice(index - first, 1).to_pylist()[0]


def shards(manifest: Mapping[str, Any]) -> list[range]:
    """The rows of each shard."""
    rows, size = manifest["rows"], manifest["rows_per_shard"]
    return [range(first, min(first + size, rows)) for first in range(0, rows, size)]


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"


def write_shard(path: Path, layout: str, rows: Iterator[Mapping[str, Any]]) -> None:
    """Writes `rows` to `path`, which appears when it is complete and on the disk; what an earlier,
    killed attempt left is removed."""
    schema = pa.schema([*CAUSE_COLUMNS, *get_layout(layout).prepared_columns])
    with (
        replacing(path, synced=True) as partial,
        pq.ParquetWriter(
            partial,
            schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        ) as writer,
    ):
        group: list[pa.Table] = []
        for row in rows:
            group.append(pa.Table.from_pylist([row], schema=schema))
            if len(group) == GROUP_ROWS or sum(table.nbytes for table in group) >= GROUP_BYTES:
                writer.write_table(pa.concat_tables(group).combine_chunks())
                group = []
        if group:
            writer.write_table(pa.concat_tables(group).combine_chunks())
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()


def bad(error: BadRow) -> dict[str, str]:
    """A row or an image that cannot be used, as it is stored."""
    return {"cause": error.cause, "detail": error.detail}


def tensor_bytes(tensor: torch.Tensor, dtype: str) -> bytes:
    """Little-endian values, row by row."""
    return tensor.to("cpu", DTYPES[dtype]).contiguous().view(torch.uint8).numpy().tobytes()


def png_bytes(image: Image.Image) -> bytes:
    """Lossless: the encoder of an 8-bit RGB picture reads the same pixels from it."""
    buffer = io.BytesIO()
    # From the bare pixels: profiles and other marks of the source are of no use.
    Image.fromarray(np.asarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises SettingsError for a file that no version wrote, or another version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_regular(path, LARGEST_MANIFEST))
        if not isinstance(manifest, dict):
            raise ValueError("it holds no object")
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"its format is {manifest.get('format')!r}, this version reads {FORMAT}; prepare "
                "it again"
            )
        objects = (manifest["recipe"], manifest["unreadable_files"])
        numbers = (manifest["rows"], manifest["rows_per_shard"])
        valid = (
            manifest["layout"] in LAYOUTS
            and manifest["dtype"] in DTYPES
            and all(isinstance(value, dict) for value in objects)
            and all(type(value) is int and value > 0 for value in numbers)
        )
        if not valid:
            raise ValueError("its values are not those of a preparation")
        return manifest
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise SettingsError("path", f"'{path}' is not readable: {one_line(error)}") from None


def claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Makes the folder one of this preparation, or continues it. Raises SettingsError if it is
    of another one."""
    path = folder / MANIFEST
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
        # Ranks of one preparation arrive together, and the first may have begun its shards: look
        # again.
        if not path.exists():
            if there:
                raise SettingsError(
                    "--out",
                    f"'{folder}' holds {there[0]} and no {MANIFEST}; give a new or empty folder.",
                )
            replace_text(path, json.dumps(manifest, indent=1) + "\n")
    for key, given, wanted in _differences(read_manifest(folder), manifest):
        raise SettingsError(
            "--out",
            f"'{folder}' was prepared with {key} {_show(given)}, this preparation has "
            f"{_show(wanted)}; give another folder, or "
            "remove this one.",
        )


def _differences(
    given: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for key in FIELDS:
        ours, theirs = wanted.get(key), given.get(key)
        if theirs != ours:
            yield key, theirs, ours
    # The names alone: the reasons are texts of libraries, whose versions differ.
    unreadable = sorted(given["unreadable_files"]), sorted(wanted["unreadable_files"])
    if unreadable[0] != unreadable[1]:
        yield "unreadable_files", *unreadable
    for key in {**given["recipe"], **wanted["recipe"]}:
        theirs, ours = _value_of(given["recipe"], key), _value_of(wanted["recipe"], key)
        if theirs != ours:
            yield key, theirs, ours


def _value_of(recipe: Mapping[str, Any], key: str) -> Any:
    return recipe.get(key, EARLIER_VALUES.get(key))


def _raise_stored(stored: Mapping[str, Any]) -> None:
    if stored["cause"] is not None:
        raise BadRow(stored["cause"], stored["detail"])


def _show(value: Any) -> str:
    return json.dumps(value)
