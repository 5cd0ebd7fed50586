"""Which data files a path names: folders through their links, sets that `datasets` saved, splits,
and companions without rows."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from uno_ds.data.csv_rows import METADATA
from uno_ds.data.files import JSON_SUFFIX, SUFFIXES
from uno_ds.data.json_array import begins_array
from uno_ds.data.layouts import LAYOUTS
from uno_ds.data.tables import parquet_columns
from uno_ds.files_on_disk import read_regular
from uno_ds.settings import SettingsError, printable

TRAIN, ALL = "train", "all"
# Words by which the authors of data sets name their splits, in file names and in names of folders.
SPLITS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD: dict[str, str] = {}
for _split, _words in SPLITS.items():
    _SPLIT_OF_WORD |= dict.fromkeys(_words, _split)
_CACHE_OF_DATASETS = re.compile(r"(cache-|tmp)\w+\.arrow")
LARGEST_STATE = 64 * 1024**2  # bytes of a state.json that are read


@dataclass
class Listing:
    """`files` to read, sorted. `notes`: what was chosen and what was left out, a line each."""

    files: list[Path]
    notes: list[str] = field(default_factory=list)

    def leave_out(self, files: Iterable[Path], reason: str) -> None:
        """With a note that counts them and names the first."""
        others = sorted(files)
        if not others:
            return
        number = f"{len(others)} files" if len(others) > 1 else "1 file"
        self.notes.append(f"leaves out {number} {reason} ('{printable(others[0])}')")
        self.files = sorted(set(self.files).difference(others))


def find(path: str) -> list[Path]:
    """Every file with the suffix of a data file that a file, a folder (to any depth) or a glob
    names, sorted; hidden ones are left out. Of a folder without any, metadata.csv files and the
    json files that hold an array. Raises OSError for a folder that cannot be listed."""
    given = Path(path).expanduser()
    if given.is_dir():
        return _walk(given)
    if given.exists():
        return [given]
    matches = map(Path, glob.glob(str(given), recursive=True))
    suffixes = (*SUFFIXES, JSON_SUFFIX) if given.suffix == JSON_SUFFIX else SUFFIXES
    return sorted(match for match in matches if match.suffix in suffixes and not match.is_dir())


def list_files(path: str, split: str | None = None) -> Listing:
    """The files of `find` that are to be read. `split`: a split's name, "all", or None, which takes
    train where files are named by splits. Raises SettingsError (key "split"), or OSError."""
    given = Path(path).expanduser()
    listing = Listing(find(path))
    if listing.files == [given]:
        return listing  # a file named on its own is never left out
    _keep_once(listing)
    is_folder = given.is_dir()
    _keep_saved(listing, is_folder)
    _keep_split(listing, given if is_folder else None, path, split)
    _keep_rows(listing)
    return listing


def _walk(root: Path) -> list[Path]:
    """Each folder once, by its real path, and outside of `root` through links in it, but never
    upwards."""
    seen: set[str] = set()
    above = {os.path.realpath(parent) for parent in root.resolve().parents}
    folders = [root]
    linked: list[Path] = []
    files: list[Path] = []
    others: list[Path] = []
    while folders or linked:
        # Real folders first: what is in one is named by its own path, not by that of a link to it.
        folder = folders.pop() if folders else linked.pop(0)
        real = os.path.realpath(folder)
        if real in seen or real in above:
            continue
        seen.add(real)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            item = folder / entry.name
            is_link = entry.is_symlink()
            # Only links cost a look at the disk: a folder of images has many entries.
            is_folder = item.is_dir() if is_link else entry.is_dir()
            if is_folder:
                (linked if is_link else folders).append(item)
            elif item.suffix in SUFFIXES:
                files.append(item)
            elif item.suffix == JSON_SUFFIX or item.name == METADATA:
                others.append(item)
    return sorted(files or filter(_holds_rows, others))


def _holds_rows(path: Path) -> bool:
    try:
        return path.name == METADATA or begins_array(path)
    except OSError:
        return False


def _keep_once(listing: Listing) -> None:
    """A file that several links lead to: its own path, else the first."""
    chosen: dict[str, Path] = {}
    for file in sorted(listing.files, key=lambda file: (file.is_symlink(), file)):
        chosen.setdefault(os.path.realpath(file), file)
    others = set(listing.files).difference(chosen.values())
    listing.leave_out(others, "that the source has under another name too")


def _keep_saved(listing: Listing, is_folder: bool) -> None:
    """Of folders written by `save_to_disk` what their state.json lists: map, filter and shuffle
    leave other arrow files in the same folder."""
    folders: dict[Path, set[Path]] = {}
    for file in listing.files:
        if file.suffix == ".arrow":
            folders.setdefault(file.parent, set()).add(file)
    for folder, found in folders.items():
        state = folder / "state.json"
        named = _files_of_state(state)
        if named is None and len(found) > 1:
            caches = [file for file in found if _CACHE_OF_DATASETS.fullmatch(file.name)]
            listing.leave_out(caches, "that Hugging Face datasets left there as a cache")
        elif named is not None:
            listing.leave_out(found - named, f"that '{printable(state)}' does not list")
            # One that is missing is named when it is opened.
            listing.files = sorted({*listing.files, *(named if is_folder else ())})


def _files_of_state(path: Path) -> set[Path] | None:
    """What a state.json of `save_to_disk` lists, or None where there is none. Raises
    SettingsError."""
    if not path.exists():
        return None
    state = _read_json(path)
    entries = state.get("_data_files")
    if entries is None:
        return None  # of another program
    try:
        names = [entry["filename"] for entry in entries]
        if any(Path(name).name != name for name in names):
            raise ValueError("it names a file outside of its folder")
    except (TypeError, KeyError, ValueError) as error:
        raise SettingsError(
            "path", f"'{printable(path)}' is not as save_to_disk writes it: {printable(error)}."
        ) from None
    return {path.with_name(name) for name in names}


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(read_regular(path, LARGEST_STATE))
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        reason = printable(error)
    else:
        return content if isinstance(content, dict) else {}
    raise SettingsError("path", f"'{printable(path)}' cannot be read: {reason}.")


def split_named(name: str) -> str:
    """The split that a word means: "valid" and "dev" are validation. Others are returned."""
    return _SPLIT_OF_WORD.get(name.lower(), name)


def _keep_split(listing: Listing, root: Path | None, path: str, split: str | None) -> None:
    named = {file: _split_of(file, root) for file in listing.files}
    found = Counter(named.values())
    splits = sorted(name for name in found if name)
    wanted = split_named(split) if split else None
    if wanted == ALL or (wanted is None and not splits):
        return
    counts = ", ".join(
        f"{name or 'unnamed'} {found[name]}" for name in [*splits, None] if found[name]
    )
    if wanted is None and root is None and len(found) == 1:
        return  # the glob names one split
    if wanted is None:
        wanted = TRAIN
        if not found[TRAIN] and not found[None]:
            raise SettingsError(
                "split",
                f"'{printable(path)}' has files of the splits {printable(', '.join(splits))} and "
                f"none of train; choose one with split ({', '.join(splits)}, or all).",
            )
    if wanted == TRAIN:
        chosen = {file for file, name in named.items() if name in (TRAIN, None)}
    else:
        chosen = {file for file, name in named.items() if name == wanted}
    if not chosen:
        raise SettingsError(
            "split",
            f"is '{printable(split)}', and '{printable(path)}' has no file of it; it has (files) "
            f"{printable(counts)}.",
        )
    others = [name for name in splits if name != wanted]
    if others or split:
        listing.notes.append(
            f"reads the split {wanted} (data.sources[].split chooses another, or all); files: "
            f"{counts}"
        )
    listing.files = sorted(chosen)


def _split_of(file: Path, root: Path | None) -> str | None:
    """By the name of the file, else by that of the nearest folder below `root` that names a
    split."""
    above = list(file.relative_to(root).parents)[:-1] if root is not None else []
    for part in (file.stem, *(folder.name for folder in above)):
        words = [word.strip("0123456789") for word in re.split(r"[-_.\s]+", part.lower())]
        split = next((_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD), None)
        if split is not None:
            return split
    # As `datasets` saves a set of splits: a folder for each, whatever it is called.
    is_saved = bool(above) and (file.parent.parent / "dataset_dict.json").is_file()
    return file.parent.name if is_saved else None


def _keep_rows(listing: Listing) -> None:
    """Without the tables of addresses and sizes that img2dataset writes next to its archives."""
    archives = {file.with_suffix("") for file in listing.files if file.suffix == ".tar"}
    tables = [file for file in listing.files if file.suffix == ".parquet"]
    companions = [file for file in tables if file.with_suffix("") in archives]
    listing.leave_out(
        filter(_has_no_rows, companions),
        "without a column of images or conversations, each beside an archive of the same name",
    )


def _has_no_rows(file: Path) -> bool:
    try:
        columns = parquet_columns(file)
        return all(layout.row_columns.isdisjoint(columns) for layout in LAYOUTS.values())
    except (OSError, pa.ArrowException):
        return False  # it is named as unreadable when it is opened
