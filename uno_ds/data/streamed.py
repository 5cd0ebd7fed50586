"""Data sets of the Hugging Face hub whose rows are read as they arrive, in the order of the data
set's files, and not from a copy on this machine. A position in one is the state that `datasets`
gives for it."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from uno_ds.data.examples import Example
from uno_ds.data.files import one_line
from uno_ds.data.hub import Address, read_address
from uno_ds.data.images import BadRow, ImageSettings, decode
from uno_ds.data.listing import TRAIN, split_named
from uno_ds.data.recognition import Reading
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.settings import SettingsError, printable

# From the first rows the layout and the columns are taken; they are also those that are checked.
FIRST_ROWS = 64
# Epochs differ in the order of files, and `datasets` takes a number for that.
_LARGEST_EPOCH = 2**62


@dataclass(frozen=True)
class StreamedRow:
    """A row, and the states of its lane's rows (JSON-able) from which it and its successor are the
    next one."""

    columns: Mapping[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]


class LaneRows:
    """The endless rows of one lane: its share of the data set, again and again, with the files in
    another order in each epoch."""

    def __init__(self, source: "StreamedSource", lane: int, lanes: int, seed: int):
        from datasets.distributed import split_dataset_by_node

        self._source, self._seed = source, seed
        self.state: dict[str, Any]
        self._iterator: Iterator[Mapping[str, Any]]
        self._rows_of_lane = split_dataset_by_node(source.data_set, rank=lane, world_size=lanes)
        self.restore({"epoch": 0, "rows": None})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues after the row whose `after`, or with the one whose `before`, this is."""
        self._begin(state["epoch"], state["rows"])

    def next(self) -> StreamedRow:
        """Raises SettingsError if the data set cannot be read, or the lane gets none of its
        rows."""
        before = self.state
        columns = self._next_columns()
        if columns is None:
            self._begin(self.state["epoch"] + 1, None)
            columns = self._next_columns()
        if columns is None:
            raise self._source.error("it has fewer rows than there are packs in a step")
        self.state = {"epoch": self.state["epoch"], "rows": self._rows_of_lane.state_dict()}
        return StreamedRow(columns, before, self.state)

    def _begin(self, epoch: int, state: Mapping[str, Any] | None) -> None:
        self.state = {"epoch": epoch, "rows": state}
        order = np.random.SeedSequence([self._seed, epoch]).generate_state(1, np.uint64)[0]
        # The same for all lanes; 0 would leave the files in their order.
        self._rows_of_lane.set_epoch(1 + int(order) % _LARGEST_EPOCH)
        self._rows_of_lane.load_state_dict(state)
        self._iterator = iter(self._rows_of_lane)

    def _next_columns(self) -> Mapping[str, Any] | None:
        try:
            return next(self._iterator, None)
        except Exception as error:  # each library below raises its own
            raise self._source.error(f"reading its rows failed: {one_line(error)}") from None


class StreamedSource(Source):
    """A data set of the hub whose rows arrive one after the other: `lane_rows` gives them. By
    number it has the first FIRST_ROWS only, from which it is checked. Raises SettingsError."""

    is_streamed = True

    def __init__(self, settings: SourceSettings, *, decoding: ImageSettings | None = None):
        self._address = read_address(settings.path)
        self.data_set = _open(self._address, settings)
        super().__init__(settings, decoding=decoding)

    def lane_rows(self, lane: int, lanes: int, seed: int) -> LaneRows:
        """The rows of one of so many lanes, none of which has a row of another in an epoch."""
        return LaneRows(self, lane, lanes, seed)

    def read_row(self, number: int, row: Mapping[str, Any], rng: np.random.Generator) -> Example:
        """As `read`; `number` is for the sample's key. Raises BadRow."""
        return self._example(f"{self.name}:{number}", self._files.paths[0], row, rng)

    @functools.cached_property
    def reading(self) -> Reading:
        return self._reading_of(None)

    def incomplete(self) -> SettingsError:
        """For what needs every row by number."""
        return self.error(
            "its rows are streamed, and this needs all of them by number", "streaming"
        )

    def digest(self) -> str:
        raise self.incomplete()

    def _open_files(self, *_: Any, **__: Any) -> "_FirstRows":
        try:
            rows = list(itertools.islice(self.data_set, FIRST_ROWS))
        except Exception as error:  # each library below raises its own
            raise self.error(f"reading its rows failed: {one_line(error)}") from None
        return _FirstRows(Path(self._address.name), rows)

    def _folders(self, file: Path) -> list[Path]:
        return [] if self.settings.images is None else super()._folders(file)

    def _image(self, value: object, file: Path) -> Image.Image:
        if isinstance(value, Mapping) and value.get("bytes") is None:
            path = value.get("path")
            if isinstance(path, str) and self._address.has(path):
                return decode(_bytes_at(path), self._decoding)
        return super()._image(value, file)


class _FirstRows:
    """The first rows of a data set in the place of its files."""

    unreadable: Mapping[str, str] = MappingProxyType({})
    lost: Mapping[str, str] = MappingProxyType({})
    first_columns: list[tuple[str, ...] | None]

    def __init__(self, path: Path, rows: Sequence[Mapping[str, Any]]):
        self.paths, self._rows = [path], rows
        first = rows[0] if rows else {}
        self.first_columns = [tuple(str(column) for column, value in first.items() if value)]

    def __len__(self) -> int:
        return len(self._rows)

    def first_rows(self, count: int) -> list[range]:
        return [range(min(count, len(self)))]

    def locate(self, index: int) -> tuple[Path, int]:
        """The data set and, past the first rows, the number of the draw."""
        return self.paths[0], index

    def read(self, index: int) -> tuple[Path, Mapping[str, Any]]:
        return self.paths[0], self._rows[index]


def _open(address: Address, settings: SourceSettings) -> Any:
    """The split as an IterableDataset with encoded images. Raises SettingsError."""
    import datasets

    inside: dict[str, str] = {}
    if address.inside is not None:
        is_file = re.search(r"[*?\[]|\.\w+$", address.inside) is not None
        inside["data_files" if is_file else "data_dir"] = address.inside
    try:
        splits = datasets.load_dataset(
            address.name, revision=address.revision, streaming=True, **inside
        )
    except Exception as error:  # each library below raises its own
        raise SettingsError(
            "path", f"'{printable(settings.path)}' cannot be streamed: {one_line(error)}"
        ) from None
    rows = splits[_split_of(splits, settings)]
    # Without features, as of json lines, nothing is decoded.
    return rows.decode(False) if rows.features else rows


def _split_of(splits: Mapping[str, Any], settings: SourceSettings) -> str:
    names = [str(name) for name in splits]
    wanted = settings.split
    if wanted is None:
        train = [name for name in names if split_named(name) == TRAIN]
        found = train or names
    else:
        found = [name for name in names if name == wanted]
        found = found or [name for name in names if split_named(name) == split_named(wanted)]
    if len(found) == 1:
        return found[0]
    given = f"is '{printable(wanted)}'" if wanted else "is not given"
    raise SettingsError(
        "split",
        f"{given}, and '{printable(settings.path)}' has the splits "
        f"{printable(', '.join(names))}; give one of them (one is streamed).",
    )


def _bytes_at(path: str) -> bytes:
    from huggingface_hub import HfFileSystem

    try:
        return HfFileSystem().read_bytes(path)
    except Exception as error:  # each library below raises its own
        raise BadRow("missing_image", f"'{path:.200}': {one_line(error)}") from None
