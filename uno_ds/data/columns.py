"""Which columns of a row hold what: by the names that public data sets use, or those of a source.

A layout states its meanings (image, caption, ...), each with the column names under which it is
recognised. `ColumnReader` turns a raw row into the values of these meanings.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

from uno_ds.data.images import BadRow

# Column names as `columns` maps them: meaning -> columns.
Chosen = Mapping[str, tuple[str, ...]]
ROW = "row"
# Sets of columns whose meanings are kept; rows of json lines may each have their own.
MOST_KEPT = 1000
_IMAGE_SUFFIX = re.compile(r"[._](jpe?g|png|webp|avif|gif|bmp|tiff?|txt)$")


@dataclass(frozen=True)
class Meaning:
    """What a row holds once. `names`: its columns, in the order in which they are preferred;
    `others`: where none of `names` is there, and of which a row may have one only; `last`: where
    none of those is there; `pattern`: every column whose name matches. `texts`: several columns
    that a source gives are read together, otherwise the first that has a value."""

    names: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None
    required: bool = True
    texts: bool = False


# The meanings of a row, by name. A layout has a form for each way in which its rows are laid out.
Form = Mapping[str, Meaning]


class AmbiguousColumns(Exception):
    """Several columns that may have the same meaning."""

    def __init__(self, meaning: str, columns: Sequence[str]):
        super().__init__(f"{meaning} may be any of the columns {', '.join(columns)}")
        self.meaning, self.columns = meaning, tuple(columns)


class ColumnReader:
    """Reads the rows of one source. `given`: the columns that the source names for some of the
    meanings."""

    def __init__(self, forms: Sequence[Form], given: Mapping[str, Sequence[str]] | None = None):
        self.forms = forms
        self.given = {name: tuple(columns) for name, columns in (given or {}).items()}
        self._found: dict[tuple[str, ...], Chosen] = {}

    def columns(self, row: Mapping[str, Any]) -> Chosen:
        """The columns of each meaning in this row. Raises AmbiguousColumns."""
        filled = [str(column) for column, value in row.items() if value is not None]
        given = chain.from_iterable(self.given.values())
        filled += [column for column in given if value_at(row, column) is not None]
        key = tuple(dict.fromkeys(filled))
        if key not in self._found:
            if len(self._found) >= MOST_KEPT:
                self._found.clear()
            self._found[key] = find_columns(self.forms, key, self.given)
        return self._found[key]

    def read(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """{meaning: the values of its columns that are not null, in their order}, as one list where
        the source gave several columns of texts; and the raw row under ROW. A layout without forms
        reads the raw row. Raises BadRow."""
        if not self.forms:
            return row
        try:
            chosen = self.columns(row)
        except AmbiguousColumns as error:
            raise BadRow("ambiguous_columns", str(error)) from None
        values: dict[str, list[Any]] = {ROW: [row]}
        for name, columns in chosen.items():
            found = [value_at(row, column) for column in columns]
            found = [value for value in found if value is not None]
            together = name in self.given and len(found) > 1 and self._holds_texts(name)
            values[name] = [found] if together else found
        return values

    def _holds_texts(self, name: str) -> bool:
        return any(form[name].texts for form in self.forms if name in form)


def find_columns(
    forms: Sequence[Form],
    columns: Sequence[str],
    given: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> Chosen:
    """The columns of each meaning of the first form of which none is missing, else of the form of
    which most are there. Raises AmbiguousColumns."""
    best: Chosen = {}
    for form in forms:
        chosen = _columns_of_form(form, columns, given)
        if is_complete(form, chosen, given):
            return chosen
        best = max(best, chosen, key=len)
    return best


def is_complete(form: Form, chosen: Chosen, given: Iterable[str] = ()) -> bool:
    """Whether the form has every meaning that the source names, and a column for each that it
    needs."""
    needed = {name for name, meaning in form.items() if meaning.required}
    return needed <= chosen.keys() and set(given) <= form.keys()


def _columns_of_form(
    form: Form, columns: Sequence[str], given: Mapping[str, tuple[str, ...]]
) -> Chosen:
    taken = set(chain.from_iterable(given.values()))
    free = {plain_name(column): column for column in reversed(columns) if column not in taken}
    chosen: dict[str, tuple[str, ...]] = {}
    ambiguous: list[AmbiguousColumns] = []
    for name, meaning in form.items():
        if name in given:
            found = [column for column in given[name] if column in columns]
        else:
            found = [known for known in meaning.names if known in free]
            others = [known for known in meaning.others if known in free]
            if not found and len(others) > 1:
                ambiguous.append(AmbiguousColumns(name, [free[other] for other in others]))
            found = found or others or [known for known in meaning.last if known in free]
            if meaning.pattern is not None:
                matching = filter(meaning.pattern.fullmatch, free)
                found += sorted(set(matching).difference(found))
            found = [free.pop(known) for known in found]
        if found:
            chosen[name] = tuple(found)
    if ambiguous and is_complete(form, chosen, given):
        raise ambiguous[0]
    return chosen


def value_at(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column; "a.b" is the field b of the column a where no column has that name."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def first(values: Mapping[str, Any], meaning: str) -> Any:
    """The first value of a meaning; None where it has none."""
    found = values.get(meaning)
    return found[0] if found else None


def plain_name(column: str) -> str:
    """A column name for comparison: "Source-Image.jpg" is "source_image"."""
    lower = column.strip().lower()
    stem = _IMAGE_SUFFIX.sub("", lower)
    return re.sub(r"[-.\s]+", "_", stem)
