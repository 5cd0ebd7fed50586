"""Prompts of a benchmark, and how its files are read."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uno_ds.files_on_disk import read_regular
from uno_ds.json_text import read_json
from uno_ds.settings import SettingsError, printable

LARGEST_FILE = 1_000_000_000
HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Item:
    """A prompt or an instruction of a benchmark. `key`: unique, the same in every call; `group`:
    the category that results are listed by; `facts`: the benchmark's own row; `sources`: files of
    the images that are edited."""

    key: str
    prompt: str
    group: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[Path, ...] = ()


def seed_of(prompt: str, number: int) -> int:
    """Seed of a prompt's image `number`: a hash, so that it depends on nothing else."""
    digest = hashlib.sha256(f"{prompt}\0{number}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big")


def digest_of(path: Path) -> str:
    """sha256 of a file, or of the files below a folder by name and size."""
    total = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                size = file.stat().st_size
                total.update(f"{file.relative_to(path)}\0{size}\0".encode())
        return total.hexdigest()
    with path.open("rb") as stream:
        while block := stream.read(HASHED_AT_ONCE):
            total.update(block)
    return total.hexdigest()


def read_text(path: Path, flag: str = "--data") -> str:
    """A UTF-8 file with or without a byte-order mark. Raises SettingsError of the flag."""
    try:
        return read_regular(path, LARGEST_FILE).decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(flag, f"{path} cannot be read: {reason}.") from None
    except UnicodeDecodeError:
        raise SettingsError(flag, f"{path} is not a text file in UTF-8.") from None


def read_json_file(path: Path, flag: str = "--data") -> Any:
    try:
        return read_json(read_text(path, flag))
    except json.JSONDecodeError as error:
        raise SettingsError(flag, f"{path} is not JSON: {error}.") from None
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(flag, f"{path} is not usable JSON: {error}.") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank."""
    # Only newlines separate lines: a text may hold other separators.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = read_json(line)
        except ValueError as error:
            raise SettingsError("--data", f"{path}, line {number}: not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise SettingsError("--data", f"{path}, line {number}: must be a JSON object.")
        yield number, row


def read_table(path: Path, delimiter: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV or TSV file with a header that names at least `columns`. Quotes are part of the
    text in a TSV file, whose fields hold no tabs."""
    stream = io.StringIO(read_text(path), newline="")
    if delimiter == "\t":
        rows = list(csv.DictReader(stream, delimiter=delimiter, quoting=csv.QUOTE_NONE))
    else:
        rows = list(csv.DictReader(stream, delimiter=delimiter))
    header = list(rows[0]) if rows else []
    missing = [name for name in columns if name not in header]
    if missing:
        raise SettingsError(
            "--data",
            f"{path} has no column {', '.join(missing)}; its header must name "
            f"{', '.join(columns)}.",
        )
    for number, row in enumerate(rows, start=2):
        if any(row[name] is None for name in columns):
            raise SettingsError("--data", f"{path}: row {number} has too few columns.")
    return rows


def text_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """A text of a row that must not be missing or blank."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise SettingsError("--data", f"{where}: '{name}' must be a text, got {printable(value)}.")
    return value


def check_keys(items: list[Item], path: Path) -> list[Item]:
    """The items. Raises SettingsError if there are none, or two have one key."""
    if not items:
        raise SettingsError("--data", f"{path} holds no prompt.")
    seen: set[str] = set()
    for item in items:
        if item.key in seen:
            raise SettingsError("--data", f"{path} holds '{printable(item.key)}' twice.")
        seen.add(item.key)
    return items


def safe_name(text: str, where: str) -> str:
    """A text of a data file that becomes the name of a file: one that leaves no folder."""
    if not text or text in (".", "..") or any(sign in text for sign in '/\\\0\n\r:*?"<>|'):
        raise SettingsError("--data", f"{where}: '{printable(text)}' cannot name a file.")
    return text
