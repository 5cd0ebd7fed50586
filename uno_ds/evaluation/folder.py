"""The folder of an evaluation: what was drawn with which settings and seeds.

evaluation.json   benchmark, prompts, checkpoint, settings of the sampler
seeds.jsonl       every image with its prompt and seed
images/           the images as the benchmark's own scorer reads them
answers/          what judges answered
scores/           a result for each scorer
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uno_ds.evaluation.benchmark import Benchmark
from uno_ds.evaluation.items import Item, digest_of
from uno_ds.files_on_disk import read_regular, replace_text
from uno_ds.json_text import read_json
from uno_ds.settings import SettingsError, printable

RECORD = "evaluation.json"
SEEDS = "seeds.jsonl"
FORMAT = 1
# What does not change the images, or not on purpose.
NOT_COMPARED = ("device", "version", "checkpoint.path", "data.path", "data.prompts")
READ_AT_BOTH_ENDS, BLOCK, BLOCKS = 1 << 20, 4096, 64


@dataclass(frozen=True)
class Request:
    """One image to draw."""

    item: Item
    number: int
    seed: int
    path: Path


def requests_of(
    benchmark: Benchmark, items: Sequence[Item], out: Path, variant: str
) -> list[Request]:
    """All images of the prompts, in their order."""
    found = []
    for item, seeds in zip(items, benchmark.seeds(items), strict=True):
        for number, seed in enumerate(seeds):
            path = out / benchmark.drawn_path(item, number, variant)
            found.append(Request(item, number, seed, path))
    return found


def write_record(out: Path, record: dict[str, Any], requests: Sequence[Request]) -> None:
    """Writes evaluation.json and seeds.jsonl, or, where they are there, checks that the images
    there were drawn alike. Raises SettingsError that names the first difference."""
    before = read_record(out)
    if before is not None:
        _check_same(out, before, record)
    lines = [
        json.dumps(
            {
                "image": str(request.path.relative_to(out)),
                "key": request.item.key,
                "number": request.number,
                "seed": request.seed,
                "prompt": request.item.prompt,
            },
            ensure_ascii=True,
        )
        for request in requests
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / RECORD, json.dumps(record, indent=1) + "\n", synced=True)
        replace_text(out / SEEDS, "\n".join(lines) + "\n")
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError("--out", f"{out} cannot be written: {reason}.") from None


def read_record(out: Path) -> dict[str, Any] | None:
    """What evaluation.json holds; None if there is none. Raises SettingsError if it is damaged."""
    path = out / RECORD
    if not path.exists():
        return None
    try:
        record = read_json(read_regular(path))
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError("it is of another format")
        for key in ("benchmark", "variant", "settings", "checkpoint", "data"):
            if key not in record:
                raise ValueError(f"it has no '{key}'")
    except (OSError, ValueError) as error:
        raise SettingsError(str(path), f"is not the record of an evaluation: {error}.") from None
    return record


def fingerprint(files: Sequence[Path]) -> str:
    """Tells weights apart without reading all of them: sizes, both ends and evenly spaced blocks of
    every file."""
    total = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        total.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as stream:
            total.update(stream.read(READ_AT_BOTH_ENDS))
            for number in range(1, BLOCKS):
                stream.seek(size * number // BLOCKS)
                total.update(stream.read(BLOCK))
            stream.seek(max(0, size - READ_AT_BOTH_ENDS))
            total.update(stream.read(READ_AT_BOTH_ENDS))
    return total.hexdigest()


def data_record(data: Path | None, items: Sequence[Item]) -> dict[str, Any]:
    """The prompts, for the record: file, hash and number."""
    if data is None:
        return {"path": None, "sha256": None, "prompts": len(items)}
    return {"path": str(data.resolve()), "sha256": digest_of(data), "prompts": len(items)}


def remove_partial_files(requests: Sequence[Request]) -> None:
    """Removes what a killed call left of these images."""
    wanted: dict[Path, set[str]] = {}
    for request in requests:
        wanted.setdefault(request.path.parent, set()).add(request.path.name)
    for folder, names in wanted.items():
        for entry in _entries(folder):
            name = entry.name
            whole = name[1:].removesuffix(".part").rpartition(".")[0]
            if name.startswith(".") and name.endswith(".part") and whole in names:
                Path(entry.path).unlink(missing_ok=True)


def _entries(folder: Path) -> Iterator[os.DirEntry]:
    try:
        yield from os.scandir(folder)
    except OSError:
        return


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = _flat(before), _flat(now)
    for key in dict.fromkeys([*old, *new]):
        if key in NOT_COMPARED or old.get(key) == new.get(key):
            continue
        there, here = printable(old.get(key), 80), printable(new.get(key), 80)
        raise SettingsError(
            "--out",
            f"{out} holds images that were drawn with another {key}: {there} there, {here} now; "
            "give another folder, or remove that one.",
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
