"""Sources of training data: where the rows are, in which layout, and how often they are drawn."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from uno_ds.data import scenes
from uno_ds.data.captions import CaptionReader
from uno_ds.data.columns import ColumnReader
from uno_ds.data.examples import Example
from uno_ds.data.files import Files, named_after, one_line
from uno_ds.data.hub import is_hub_path, local_path
from uno_ds.data.image_columns import image_bytes
from uno_ds.data.images import BadRow, ImageSettings, decode
from uno_ds.data.layouts import AUTO, LAYOUTS, get_layout, known_meanings
from uno_ds.data.listing import list_files
from uno_ds.data.recognition import (
    Reading,
    Rows,
    check_given,
    columns_of,
    image_prefix,
    infer_layout,
    lacking,
    name_of,
    readable,
)
from uno_ds.settings import SettingsError, printable, setting

Parsed = TypeVar("Parsed")
EMBEDDED = tuple(f"scenes/{name}" for name in scenes.SETS)
ROWS_PER_LAYOUT_SEARCH = 100  # rows of a file from which its layout is inferred
# First rows of a file in which the columns that a source names, and its images, are looked for.
ROWS_TO_CHECK = 20


@dataclass(frozen=True)
class SourceSettings:
    path: str = setting(
        doc="File, folder or glob of parquet, arrow, tar, jsonl or json files; "
        "hf://datasets/ORG/NAME, a data set of the Hugging Face hub; scenes/t2i, scenes/edit, "
        "scenes/vlm, the embedded sets; or a folder that prepare_data.py wrote."
    )
    name: str | None = setting(None, doc="Name in logs and counters; null takes it from the path.")
    layout: str = setting(
        AUTO,
        choices=(AUTO, *LAYOUTS),
        doc="Meaning of a row: t2i (image, captions), edit (source and target image, instruction), "
        "vlm (conversations, images), interleaved (parts); auto looks at the columns.",
    )
    columns: dict[str, list[str] | str] | None = setting(
        None,
        doc="Columns of the data by what they hold, e.g. {image: jpg, caption: [txt, caption_0]}; "
        "'a.b' is a field of a struct. Of texts all that are listed are read, of images the first "
        "that has a value. null, and what is not listed: by the names that public data sets use.",
    )
    weight: float = setting(
        1.0,
        doc="Relative frequency with which rows of this source are drawn.",
        minimum=1e-6,
        maximum=1e6,
    )
    split: str | None = setting(
        None,
        doc="Which files to read where names of files or folders contain train, validation or "
        "test: one of these, or all; null: all but those of validation and test.",
    )
    images: str | None = setting(
        None,
        doc="Folder of the images that rows name by file; null takes the folder 'images' next "
        "to the data file, or the data file's own folder.",
    )
    streaming: bool = setting(
        False,
        doc="Of hf://datasets/...: read rows as they arrive and keep no copy on the disk. They "
        "come in the order of the data set's files, which alone is shuffled. false: the files are "
        "fetched into the hub's cache first.",
    )
    caption_keys: list[str] | None = setting(
        None,
        doc="Keys of captions or instructions that are objects whose values are texts to use; "
        "null: all but those that usually hold metadata (model, lang, tokens, url, ...), which are "
        "named at the start.",
    )

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise SettingsError("path", "must not be empty.")
        if self.streaming and not is_hub_path(self.path):
            raise SettingsError(
                "streaming",
                f"is for hf://datasets/ORG/NAME; the files of '{printable(self.path)}' are read "
                "from this machine, so leave it out.",
            )
        if self.caption_keys == []:
            raise SettingsError("caption_keys", "must name at least one key, or be null.")
        meanings = known_meanings()
        for name in self.columns or {}:
            if name not in meanings:
                allowed = ", ".join(meanings)
                raise SettingsError(
                    "columns",
                    f"'{printable(name)}' is nothing that a row holds; allowed are {allowed}.",
                )
            if not self.given_columns[name]:
                raise SettingsError("columns", f"{name} must name at least one column.")

    @property
    def given_columns(self) -> dict[str, tuple[str, ...]]:
        """`columns` with a tuple for each."""
        return {
            name: (value,) if isinstance(value, str) else tuple(value)
            for name, value in (self.columns or {}).items()
        }


class RowsByNumber(Protocol):
    """As `Files`."""

    paths: list[Path]
    first_columns: list[tuple[str, ...] | None]

    @property
    def unreadable(self) -> Mapping[str, str]: ...

    @property
    def lost(self) -> Mapping[str, str]: ...

    def __len__(self) -> int: ...

    def first_rows(self, count: int) -> list[range]: ...

    def locate(self, index: int) -> tuple[Path, int]: ...

    def read(self, index: int) -> tuple[Path, Mapping[str, Any]]: ...


class Source:
    """Rows of one source by index.

    `name` and `layout` are resolved; `unreadable_files` maps the files that were skipped to the
    reason, and `lost_files` those that were removed or became shorter since; `notes`: which files
    were chosen and left out, a line each. Raises SettingsError, in one line that names the source
    and its path, if there is no readable file or no layout."""

    # For subclasses that do not watch files.
    lost_files: Mapping[str, str] = MappingProxyType({})
    notes: Sequence[str] = ()
    # Whether rows arrive one after the other, and only the first are there by number.
    is_streamed = False

    def __init__(
        self,
        settings: SourceSettings,
        *,
        decoding: ImageSettings | None = None,
        embedded: scenes.ScenesSettings | None = None,
        root: str | Path = "data",
        cache: str | Path | None = None,
    ):
        """`decoding` bounds the source images; `embedded` and `root` say how and where the embedded
        set is drawn; `cache` is the folder into which parquet files are unpacked
        (data.tables.default_cache if not given)."""
        self.settings = settings
        self.name = printable(settings.name or name_of(settings.path))
        self._reader = CaptionReader(settings.caption_keys)
        self._decoding = decoding or ImageSettings()
        if settings.images is not None and not Path(settings.images).expanduser().is_dir():
            raise self.error(f"the folder of images '{settings.images}' does not exist")
        self._files = self._open_files(embedded, root, cache)
        self.unreadable_files = self._files.unreadable
        self.lost_files = self._files.lost
        if not self._files.paths:
            number = len(self.unreadable_files)
            file, reason = next(iter(self.unreadable_files.items()))
            raise self.error(f"none of its {number} files can be read; '{file}': {reason}")
        if not len(self):
            raise self.error("its files hold no rows")
        given = settings.given_columns
        self.layout = settings.layout
        if self.layout == AUTO:
            rows = self._first_rows(ROWS_PER_LAYOUT_SEARCH)
            files = zip(self.paths, self._files.first_columns, rows, strict=True)
            self.layout = infer_layout(files, given, self.error)
        layout = get_layout(self.layout)
        self._columns = ColumnReader(layout.forms, given)
        check_given(self._first_rows(ROWS_TO_CHECK), self._columns, self.error)
        first_rows = next(self._first_rows(ROWS_TO_CHECK))
        self._prefix = image_prefix(first_rows, layout, self._columns, self._folders)

    def _open_files(
        self,
        embedded: scenes.ScenesSettings | None,
        root: str | Path,
        cache: str | Path | None,
    ) -> RowsByNumber:
        path = self.settings.path
        if path in EMBEDDED:
            folder = scenes.ensure(embedded or scenes.ScenesSettings(), root)
            path = str(folder / path.removeprefix("scenes/"))
        if is_hub_path(path):
            path = local_path(path)
        listing = list_files(path, self.settings.split)
        self.notes = listing.notes
        if not listing.files:
            hint = ""
            if path.startswith("scenes/"):
                hint = f" (the embedded sets are {', '.join(EMBEDDED)})"
            raise self.error(f"there is no parquet, arrow, tar or jsonl file{hint}")
        return Files(listing.files, Path(cache) if cache else None)

    def __len__(self) -> int:
        """Rows of the readable files, the unusable rows included."""
        return len(self._files)

    def read(self, index: int, rng: np.random.Generator) -> Example:
        """Row `index` with decoded pictures in their own size; `rng` picks the pair of a row with
        several edits. Raises BadRow."""
        return self._example(f"{self.name}:{index}", *self._files.read(index), rng)

    def read_whole(self, index: int) -> Any:
        """Row `index` with everything that `read` chooses from, as `Layout.parse_whole` returns it:
        what preparation encodes. Raises BadRow."""
        layout, key = get_layout(self.layout), f"{self.name}:{index}"
        return self._parsed(
            *self._files.read(index),
            lambda row, load: layout.parse_whole(key, row, load, self._reader),
        )

    def read_encoded(self, index: int) -> Any:
        """`read_whole` with images as the bytes that the source has, where they can be decoded.
        Raises BadRow."""
        layout, key = get_layout(self.layout), f"{self.name}:{index}"
        return self._parsed(
            *self._files.read(index),
            lambda row, load: layout.parse_whole(key, row, load, self._reader),
            self._encoded_image,
        )

    def locate(self, index: int) -> tuple[Path, int]:
        """The file of row `index`, and the row's number in it, from 0."""
        return self._files.locate(index)

    def columns(self, index: int) -> list[str]:
        """Names of the columns of row `index`; none where the row cannot be read."""
        try:
            return [str(column) for column in self._files.read(index)[1]]
        except BadRow:
            return []

    def value(self, index: int, column: str) -> Any:
        """What row `index` has in a column; None where it has none or cannot be read."""
        try:
            return self._files.read(index)[1].get(column)
        except BadRow:
            return None

    def lacking(self, index: int) -> str:
        """What the layout needs, if row `index` has no columns for it; else ""."""
        with contextlib.suppress(BadRow):
            return lacking(get_layout(self.layout), self._columns, self._files.read(index)[1])
        return ""

    @functools.cached_property
    def reading(self) -> Reading:
        """What the source is read as, with the columns and the text of its first usable row."""
        return self._reading_of(len(self))

    def _reading_of(self, rows: int | None) -> Reading:
        layout = get_layout(self.layout)
        for index in range(min(len(self), ROWS_PER_LAYOUT_SEARCH)):
            with contextlib.suppress(BadRow):
                text = layout.first_text(self.read(index, np.random.default_rng(0)))
                columns = columns_of(self._columns, self._files.read(index)[1])
                return Reading(self.layout, rows, columns, self._prefix, text)
        return Reading(self.layout, rows, image_prefix=self._prefix)

    @property
    def left_out_keys(self) -> list[str]:
        """Keys of captions and instructions whose texts were left out as metadata, in the rows read
        so far."""
        return sorted(self._reader.left_out)

    @property
    def paths(self) -> list[Path]:
        """The readable files, in the order of their rows."""
        return self._files.paths

    def digest(self) -> str:
        """Of the names and sizes of the files, in their order."""
        files = [(file.name, file.stat().st_size) for file in self.paths]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]

    def _example(
        self, key: str, file: Path, row: Mapping[str, Any], rng: np.random.Generator
    ) -> Example:
        layout = get_layout(self.layout)
        return self._parsed(
            file, row, lambda row, load: layout.parse(key, row, load, self._reader, rng)
        )

    def _parsed(
        self,
        file: Path,
        row: Mapping[str, Any],
        parse: Callable[[Mapping[str, Any], Any], Parsed],
        load: Callable[[object, Path], Any] | None = None,
    ) -> Parsed:
        load = load or self._image
        try:
            values = self._columns.read(row)
            return named_after(file)(parse, values, lambda value: load(value, file))
        except BadRow:
            raise
        except Exception as error:  # columns of another type than any reader expects
            raise BadRow("bad_row", one_line(error)) from None

    def _image(self, value: object, file: Path) -> Image.Image:
        return decode(image_bytes(value, self._folders(file), self._prefix), self._decoding)

    def _encoded_image(self, value: object, file: Path) -> bytes:
        data = image_bytes(value, self._folders(file), self._prefix)
        decode(data, self._decoding)
        return data

    def _first_rows(self, count: int) -> Iterator[Rows]:
        """For each file, the readable ones of its first `count` rows."""
        for indices in self._files.first_rows(count):
            yield readable(self._files.read, indices)

    def _folders(self, file: Path) -> list[Path]:
        """Where the images that rows of the file name are looked up."""
        if self.settings.images is not None:
            return [Path(self.settings.images).expanduser()]
        images = file.parent / "images"
        return [images, file.parent] if images.is_dir() else [file.parent]

    def error(self, message: str, key: str = "path") -> SettingsError:
        """A SettingsError that names the source and its path."""
        return SettingsError(key, f"source '{self.name}' at '{self.settings.path}': {message}.")
