"""Writes the manifest of a checkpoint, and reads it and checks the type and range of every value in
it."""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from uno_ds.files_on_disk import replace_text
from uno_ds.json_text import read_json
from uno_ds.settings import SettingsError

FORMAT = 1
MANIFEST = "manifest.json"
# The largest 64-bit integer.
_LARGEST = 2**63 - 1


def files_elsewhere(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The files of the checkpoint in `folder` that are not there, since another machine wrote them
    to its own disk."""
    written_on_a_host = sorted(set(manifest["files"]) & set(manifest.get("hosts", {})))
    return [file for file in written_on_a_host if not (folder / file).exists()]


def scattered(folder: Path, manifest: dict[str, Any]) -> SettingsError:
    """The error that names them."""
    absent = files_elsewhere(folder, manifest)
    owners = sorted({manifest["hosts"][file] for file in absent})
    names = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
    of_hosts = ", ".join(owners[:3]) + (f" and {len(owners) - 3} more" if len(owners) > 3 else "")
    return SettingsError(
        str(folder),
        f"lacks {names}, on the disk of {of_hosts}; copy to every machine that needs them: "
        f"scripts/weights.py collect {folder}",
    )


Check = Callable[[Any], bool]
# Name, bytes and hash of the file that a rank has written.
Record = tuple[str, int, str]


def write_manifest(
    folder: Path,
    common: dict[str, Any],
    parts: Sequence[tuple[Record | None, dict[str, Any]]],
    hosts: Sequence[str] | None,
) -> None:
    """Writes the manifest: `common` to all ranks, with the file and lanes of each (`parts`). hosts:
    of each rank, where machines do not share the folder; else None."""
    lanes: dict[str, Any] = {}
    files: dict[str, dict[str, Any]] = {}
    written_on: dict[str, str] = {}
    for rank, (record, lanes_of_rank) in enumerate(parts):
        lanes.update(lanes_of_rank)
        if record is None:
            continue
        name, size, digest = record
        files[name] = {"bytes": size, "hash": digest}
        if hosts is not None:
            written_on[name] = hosts[rank]
    manifest = {**common, "lanes": lanes, "files": files}
    if hosts is not None:
        manifest["hosts"] = written_on
    manifest["hash"] = digest_of_manifest(manifest)
    text = json.dumps(manifest, indent=1) + "\n"
    replace_text(folder / MANIFEST, text, synced=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest. Raises OSError, and ValueError with a sentence about the mistake."""
    if path.exists() and not path.is_file():
        raise ValueError("is no regular file.")
    try:
        manifest = read_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"is not readable JSON: {error}.") from None
    if not isinstance(manifest, dict):
        raise ValueError("is not a mapping.")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"has format {_short(manifest.get('format'))}; this version reads format {FORMAT}."
        )
    if manifest.get("hash") != digest_of_manifest(manifest):
        raise ValueError("does not hold what was written: its hash differs.")
    _check(manifest, _OF_EVERY_CHECKPOINT)
    _check_shapes(manifest)
    if not _hosts(manifest.get("hosts", {})):
        raise ValueError(f"holds no names of machines as hosts, but {_short(manifest['hosts'])}.")
    return manifest


def check_of_a_run(manifest: dict[str, Any]) -> None:
    """Checks what a run needs to continue from the checkpoint. Raises ValueError with a
    sentence."""
    _check(manifest, _OF_A_RUN)


def digest_of_manifest(manifest: dict[str, Any]) -> str:
    """Hash of all its entries except the hash itself."""
    kept = {key: value for key, value in manifest.items() if key != "hash"}
    text = json.dumps(kept, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check(manifest: dict[str, Any], checks: dict[str, tuple[Check, str]]) -> None:
    for key, (check, what) in checks.items():
        if key not in manifest:
            raise ValueError(f"lacks {key}.")
        if not check(manifest[key]):
            raise ValueError(f"holds no {what} as {key}, but {_short(manifest[key])}.")


def _check_shapes(manifest: dict[str, Any]) -> None:
    """Raises ValueError if a tensor is larger than all files together, before it is allocated."""
    room = sum(record["bytes"] for record in manifest["files"].values())
    for name, shape in manifest["shapes"].items():
        if 4 * math.prod(shape) > room:
            raise ValueError(f"gives {name} the shape {_short(shape)}, larger than all its files.")


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return _count(value) or type(value) is float and math.isfinite(value)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def _mapping_to(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(check(item) for item in value.values())


def _files(value: Any) -> bool:
    names = isinstance(value, dict) and all(
        re.fullmatch(r"rank_[0-9]{5,}\.safetensors", name) for name in value
    )
    return names and _mapping_to(_record)(value)


def _hosts(value: Any) -> bool:
    """Where each file was written, if machines do not share the folder. A name may not look like an
    option, since commands are called with it."""
    return isinstance(value, dict) and all(
        isinstance(host, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}", host)
        for host in value.values()
    )


def _record(value: Any) -> bool:
    return isinstance(value, dict) and _count(value.get("bytes")) and _text(value.get("hash"))


def _lane(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _count(value.get("draws"))
        and _list_of(_count)(value.get("positions"))
        and _waiting(value.get("waiting"), len(value["positions"]))
        and _mapping_to(_count)(value.get("skipped"))
        and _mapping_to(_stream)(value.get("streams", {}))
    )


def _stream(value: Any) -> bool:
    """Of a source whose rows are streamed; `rows` is what the library `datasets` reads."""
    return (
        isinstance(value, dict)
        and _count(value.get("epoch"))
        and _or_none(_mapping_to(lambda item: True))(value.get("rows"))
    )


def _waiting(value: Any, sources: int) -> bool:
    return value is None or _list_of(_count)(value) and len(value) == 2 and value[0] < sources


def _lanes(value: Any) -> bool:
    return _mapping_to(_lane)(value) and set(value) == {str(number) for number in range(len(value))}


_OF_EVERY_CHECKPOINT: dict[str, tuple[Check, str]] = {
    "step": (_count, "number of a step"),
    "optimizer_steps": (_count, "number of steps"),
    "world_size": (_count, "number of ranks"),
    "stage": (_count, "ZeRO stage"),
    "ema_updates": (_or_none(_count), "number of updates"),
    "base": (_or_none(_text), "path"),
    "tokenizer": (_text, "path"),
    "architecture": (_mapping_to(lambda value: True), "mapping"),
    "frozen": (_mapping_to(_text), "mapping of names to hashes"),
    "files": (_files, "mapping of rank files to bytes and hash"),
    "shapes": (_mapping_to(_list_of(_count)), "mapping of names to shapes"),
    "lanes": (_mapping_to(lambda value: isinstance(value, dict)), "mapping of lanes"),
}
_OF_A_RUN: dict[str, tuple[Check, str]] = {
    "lanes": (_lanes, "mapping of lane numbers to positions in the data"),
    "skipped_steps": (_count, "number of steps"),
    "recent_losses": (_list_of(_number), "list of losses"),
    "frozen_checksum": (_text, "checksum"),
    "rows": (_mapping_to(_count), "mapping of sources to rows"),
}


def _short(value: Any) -> str:
    try:
        text = reprlib.repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."
