"""What a source is read as: its layout, which columns hold what, and where its images are."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from uno_ds.data.captions import CaptionReader
from uno_ds.data.columns import AmbiguousColumns, Chosen, ColumnReader, is_complete, value_at
from uno_ds.data.image_columns import foreign_prefix
from uno_ds.data.images import BadRow
from uno_ds.data.layouts import LAYOUTS, detect_layout
from uno_ds.data.layouts.base import Layout
from uno_ds.settings import SettingsError, printable

LONGEST_COLUMNS, LONGEST_TEXT = 300, 80
# The readable ones among the first rows of a file, with the file.
Rows = Iterable[tuple[Path, Mapping[str, Any]]]
# Makes the error of a source from a sentence without its full stop; the second is the key.
ErrorOf = Callable[[str, str], SettingsError]


@dataclass(frozen=True)
class Reading:
    """`rows`: None where they are streamed; `columns`: the columns of each meaning; `image_prefix`:
    what is taken off the names of images; `first_text`: of the first usable row."""

    layout: str
    rows: int | None
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    image_prefix: str = ""
    first_text: str | None = None

    def line(self) -> str:
        """For the start of a run."""
        number = "streamed" if self.rows is None else f"{self.rows:,}"
        parts = [f"{number} rows of layout {self.layout}"]
        if self.columns:
            chosen = [f"{meaning} = {', '.join(names)}" for meaning, names in self.columns.items()]
            parts.append(printable("; ".join(chosen), LONGEST_COLUMNS))
        if self.image_prefix:
            parts.append(f"names of images without '{printable(self.image_prefix)}'")
        if self.first_text is not None:
            parts.append(f"first text '{printable(self.first_text, LONGEST_TEXT)}'")
        return "is read as " + "; ".join(parts)


def infer_layout(
    files: Iterable[tuple[Path, Sequence[str] | None, Rows]],
    given: Mapping[str, tuple[str, ...]],
    error: ErrorOf,
) -> str:
    """The name of the layout of all files, each inferred from the columns of its first row or, if
    they give none, from its first readable rows. Raises SettingsError."""
    found: dict[str, Path] = {}
    columns_seen: list[str] = []
    for path, columns_of_first, rows in files:
        if columns_of_first and (layout := _detected(columns_of_first, given, error)):
            found.setdefault(layout.name, path)
            continue
        for file, row in rows:
            if layout := _layout_of(row, given, error):
                found.setdefault(layout.name, file)
                break
            columns_seen = columns_seen or [str(column) for column in row]
    if len(found) > 1:
        names = ", ".join(f"{name} ({file.name})" for name, file in found.items())
        raise error(
            f"its files have different layouts: {names}; give each its own source, or "
            "choose one with layout",
            "path",
        )
    if found:
        return next(iter(found))
    columns = "none that can be read"
    if columns_seen:
        columns = printable(", ".join(columns_seen), LONGEST_COLUMNS)
    raise error(
        f"its layout cannot be inferred from its columns ({columns}); name them with columns: "
        f"{known_forms()}; or give layout: {', '.join(LAYOUTS)}",
        "path",
    )


def known_forms() -> str:
    """What rows of each layout need, as a source's key `columns` names it."""
    forms = [f"{_needed(layout)} for {layout.name}" for layout in LAYOUTS.values() if layout.forms]
    return ", ".join(forms)


def lacking(layout: Layout, reader: ColumnReader, row: Mapping[str, Any]) -> str:
    """What rows of the layout need, each form, for an error; "" where the row has columns for
    it."""
    chosen = columns_of(reader, row)
    if any(is_complete(form, chosen) for form in layout.forms):
        return ""
    return _needed(layout)


def _needed(layout: Layout) -> str:
    forms = []
    for form in layout.forms:
        names = [name for name, meaning in form.items() if meaning.required]
        forms.append("{" + ", ".join(names) + "}")
    return " or ".join(dict.fromkeys(forms))


def _layout_of(
    row: Mapping[str, Any], given: Mapping[str, tuple[str, ...]], error: ErrorOf
) -> Layout | None:
    filled = [str(column) for column, value in row.items() if value is not None]
    nested = chain.from_iterable(given.values())
    filled += [column for column in nested if value_at(row, column) is not None]
    return _detected(filled, given, error)


def _detected(
    columns: Iterable[str], given: Mapping[str, tuple[str, ...]], error: ErrorOf
) -> Layout | None:
    try:
        return detect_layout(dict.fromkeys(columns), given)
    except AmbiguousColumns as ambiguous:
        raise ambiguous_error(ambiguous, error) from None


def ambiguous_error(ambiguous: AmbiguousColumns, error: ErrorOf) -> SettingsError:
    return error(
        f"{printable(ambiguous, LONGEST_COLUMNS)}; choose with columns: "
        f"{{{ambiguous.meaning}: {printable(ambiguous.columns[0])}}}",
        "columns",
    )


def check_given(files: Iterable[Rows], reader: ColumnReader, error: ErrorOf) -> None:
    """Raises SettingsError for a column that the source names and no row of these has, and for
    columns that may have the same meaning."""
    missing = {name: list(columns) for name, columns in reader.given.items()}
    columns_seen: list[str] = []
    for rows in files:
        for _, row in rows:
            columns_seen = columns_seen or [str(column) for column in row]
            for name, columns in missing.items():
                missing[name] = [
                    column
                    for column in columns
                    if column not in row and value_at(row, column) is None
                ]
            try:
                reader.columns(row)
            except AmbiguousColumns as ambiguous:
                raise ambiguous_error(ambiguous, error) from None
        if not any(missing.values()):
            return
    for name, columns in missing.items():
        if columns and columns_seen:
            raise error(
                f"{name} is to be read from {printable(', '.join(columns))}, and its columns are "
                f"{printable(', '.join(columns_seen), LONGEST_COLUMNS)}",
                "columns",
            )


def image_prefix(
    rows: Rows, layout: Layout, reader: ColumnReader, folders: Callable[[Path], Sequence[Path]]
) -> str:
    """What has to be taken off the names of images in these rows, "" if nothing."""
    for file, row in rows:
        names: list[str] = []

        def note(value: Any, names: list[str] = names) -> Image.Image:
            if isinstance(value, str):
                names.append(value)
            elif isinstance(value, Mapping) and value.get("bytes") is None:
                names.append(str(value.get("path") or ""))
            return Image.new("RGB", (1, 1))

        with suppress(Exception):  # what is wrong with a row is found when it is read
            layout.parse_whole("", reader.read(row), note, CaptionReader())
        prefixes = (foreign_prefix(name, folders(file)) for name in names if name)
        if prefix := next(filter(None, prefixes), ""):
            return prefix
    return ""


def columns_of(reader: ColumnReader, row: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The columns of each meaning in this row."""
    chosen: Chosen = {}
    with suppress(AmbiguousColumns):
        chosen = reader.columns(row) if reader.forms else {}
    return dict(chosen)


def readable(read: Callable[[int], tuple[Path, Mapping[str, Any]]], indices: range) -> Rows:
    """Those of the rows that can be read, each when it is asked for."""
    for index in indices:
        with suppress(BadRow):
            yield read(index)


def name_of(path: str) -> str:
    """The last two parts of the path without its glob and suffix: "data/photos/t2i/*.parquet" gives
    "photos/t2i"."""
    parts = []
    for part in (*Path(path).parts[:-1], Path(path).stem):
        is_glob = not set("*?[]").isdisjoint(part)
        if part not in ("", "/", ".", "..") and not is_glob:
            parts.append(part)
    return "/".join(parts[-2:]) or path
