"""A checkpoint on disk: its manifest, and its tensors put together from the pieces of all ranks.
Needs no DeepSpeed.

step_N/rank_00000.safetensors ...   what each rank owned, flat and in fp32: weight/NAME,
                                    exp_avg/NAME, exp_avg_sq/NAME,
                                    average/NAME; the header says where in the flattened parameter
                                    each piece starts
step_N/manifest.json                everything that is not a tensor, and size and hash of every
                                    other file
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uno_ds.files_on_disk import replace_text
from uno_ds.json_text import read_json
from uno_ds.model.tensor_file import TensorFile, digest_of, sync_folder
from uno_ds.settings import SettingsError
from uno_ds.training.manifest import MANIFEST, read_manifest

LATEST = "latest"
# What was found out about a checkpoint after it was written, in words: sound steps followed it, or
# its weights are in doubt.
PROVEN, DOUBT = "proven", "doubt"
# Which files were found to hold what was written, and what they looked like then.
VERIFIED = "verified.json"
WEIGHT, MOMENTS, AVERAGE = "weight", ("exp_avg", "exp_avg_sq"), "average"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05}.safetensors"


def part_of(final: Path) -> Path:
    """Where a checkpoint is written before it is renamed to `final`."""
    return final.with_name(f".{final.name}.part")


def step_of(path: Path) -> int:
    return int(re.search(r"step_([0-9]+)", path.name)[1])


@dataclass(frozen=True)
class Lineage:
    """Which start of a run wrote a checkpoint, and which starts that one went on from.

    Every start has a run id of its own. before: (run id, last step taken from it) of the earlier
    starts, oldest first. The run id of a checkpoint that was written before there were run ids is
    empty.
    """

    run_id: str
    before: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Lineage":
        """Raises ValueError, KeyError or TypeError if what the manifest holds is no lineage."""
        given = manifest.get("run", {"id": "", "before": []})
        before = tuple((str(run_id), int(step)) for run_id, step in given["before"])
        return cls(str(given["id"]), before)

    def plain(self) -> dict[str, Any]:
        """As it is written into a manifest, under "run"."""
        return {"id": self.run_id, "before": [list(start) for start in self.before]}

    def continued(self, step: int, run_id: str) -> "Lineage":
        """Of the start `run_id` that continues after `step` of this one."""
        return Lineage(run_id, (*self.before, (self.run_id, step)))

    def includes(self, other: "Lineage", step: int) -> bool:
        """Whether checkpoint `step` of `other` was passed on the way to a later checkpoint of this
        lineage."""
        if other.run_id == self.run_id:
            return True
        return any(run_id == other.run_id and step <= last for run_id, last in self.before)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in the order of their steps. The manifest is written last, so a part
    that has one and lacks only the rename counts."""
    complete = [
        path
        for path in folder.glob("step_*")
        if re.fullmatch(r"step_[0-9]+", path.name) and (path / MANIFEST).exists()
    ]
    complete += _finished_parts(folder)
    return sorted(complete, key=step_of)


def newest_first(folder: Path) -> tuple[list[Path], list[str]]:
    """The complete checkpoints that a run may go on from, newest first, and the others, each with
    the reason.

    Newest is what `latest` names, or a checkpoint of a higher step whose manifest says that the
    same training wrote it later (its save was cut off before `latest` was changed). Times of files
    say nothing: copies change them. A checkpoint whose manifest cannot be read is kept in its
    place.
    """
    paths = list(reversed(complete_checkpoints(folder)))
    lineages = {path: _lineage_at(path) for path in paths}
    named = _step_of_latest(folder)
    readable = [path for path in paths if lineages[path] is not None]
    reached = [path for path in readable if named is None or step_of(path) <= named]
    reference = next(iter(reached or readable), None)
    usable, others = [], []
    for path in paths:
        lineage = lineages[path]
        if lineage is None or path == reference:
            usable.append(path)
            continue
        first, last = sorted((path, reference), key=step_of)
        related = lineages[last].includes(lineages[first], step_of(first))
        # Without run ids a higher step may also be left from a run that was started anew.
        unknown = step_of(path) > step_of(reference) and not lineage.run_id
        if related and not unknown:
            usable.append(path)
        else:
            others.append(
                f"{path.name}: {LATEST} names step_{named}, and by their manifests another start "
                f"of the run wrote {path.name}."
            )
    return usable, others


def outside_of(folder: Path, chosen: Path) -> list[Path]:
    """What a run that continues from `chosen` leaves behind in its folder: every checkpoint of that
    step or a higher one, complete or not, but for `chosen` itself, and every complete one of
    another lineage."""
    lineage, step = _lineage_at(chosen) or Lineage(""), step_of(chosen)
    found = []
    for path in sorted(folder.glob("step_*")):
        if not re.fullmatch(r"step_\d+", path.name) or path.resolve() == chosen.resolve():
            continue
        other = _lineage_at(path)
        foreign = other is not None and not lineage.includes(other, step_of(path))
        if step_of(path) >= step or foreign:
            found.append(path)
    return found


def _check_lineage(manifest: dict[str, Any]) -> None:
    """Raises ValueError with a sentence."""
    try:
        Lineage.of(manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError("does not name the starts of the run that wrote it.") from None


def _lineage_at(path: Path) -> Lineage | None:
    """None if its manifest is missing or cannot be read."""
    try:
        return Lineage.of(json.loads((path / MANIFEST).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _step_of_latest(folder: Path) -> int | None:
    """The step that `latest` names, whether its checkpoint is there or not; None if it names
    none."""
    try:
        named = re.fullmatch(r"step_(\d{1,18})", (folder / LATEST).read_text().strip())
    except (OSError, ValueError):
        return None
    return int(named[1]) if named else None


def place_finished_parts(folder: Path) -> None:
    """Makes up for renames that were cut off."""
    for part in _finished_parts(folder):
        part.rename(folder / f"step_{step_of(part)}")


def leftovers(folder: Path) -> list[Path]:
    """What saves and removals that were cut off have left; anything else is the user's."""
    return [
        path
        for path in folder.glob(".step_*")
        if re.fullmatch(r"\.step_[0-9]+\.(part|old)", path.name) and path.is_dir()
    ]


def point_latest_at(checkpoint: Path) -> None:
    """Lets the file `latest` in the same folder name this checkpoint, atomically and durably."""
    replace_text(checkpoint.with_name(LATEST), checkpoint.name + "\n", synced=True)
    sync_folder(checkpoint.parent)


def mark_proven(checkpoint: Path, step: int) -> None:
    """Notes that sound steps, up to `step`, followed it."""
    line = f"sound steps followed, up to step {step}\n"
    replace_text(checkpoint / PROVEN, line, synced=True)
    (checkpoint / DOUBT).unlink(missing_ok=True)


def is_proven(checkpoint: Path) -> bool:
    return (checkpoint / PROVEN).is_file()


def mark_doubt(checkpoint: Path, reason: str) -> None:
    replace_text(checkpoint / DOUBT, reason + "\n", synced=True)


def doubt_about(checkpoint: Path) -> str | None:
    """Why its weights are in doubt, in one line; None if they are not."""
    path = checkpoint / DOUBT
    if not path.is_file():
        return None
    try:
        words = path.read_text(errors="replace")[:500].split()
    except OSError:
        words = []
    return " ".join(words) or "the steps around it were not sound"


def _state_of(path: Path, digest: str) -> list[Any]:
    """What changes when a file is written to, replaced or copied, and the hash that it should
    have."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, digest]


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _finished_parts(folder: Path) -> list[Path]:
    return [
        part
        for part in folder.glob(".step_*.part")
        if re.fullmatch(r"\.step_[0-9]+\.part", part.name)
        and (part / MANIFEST).exists()
        and not (folder / f"step_{step_of(part)}").exists()
    ]


def is_checkpoint(path: Path) -> bool:
    """Whether `open_checkpoint` would find one here."""
    return (
        path.name == LATEST
        and path.is_file()
        or (path / MANIFEST).is_file()
        or bool(complete_checkpoints(path / "checkpoints"))
    )


def open_checkpoint(path: Path, key: str) -> tuple[Path, dict[str, Any]]:
    """(folder, manifest) of a checkpoint's folder, of the file `latest` that names one, or of a run
    (its newest). `key` names the flag in the SettingsError that is raised if there is none."""
    folder = path
    try:
        if path.is_file() and path.name == LATEST:
            folder = path.parent / path.read_text().strip()
        elif not (path / MANIFEST).exists():
            folder = next(iter(newest_first(path / "checkpoints")[0]), path)
        manifest = read_manifest(folder / MANIFEST)
        _check_lineage(manifest)
        return folder, manifest
    except OSError:
        raise SettingsError(
            key, f"{folder} is not a complete checkpoint: it has no readable {MANIFEST}."
        ) from None
    except ValueError as error:
        raise SettingsError(
            key, f"{folder / MANIFEST} {error} The checkpoint cannot be used."
        ) from None


class CheckpointTensors:
    """Trained parameters, moments and averages of a checkpoint, whole or in part, by whatever ranks
    and stage they were written. Values are read when they are asked for, and only those."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        """Raises SettingsError if a file is missing or has another size than when it was
        written."""
        self.folder, self.manifest = folder, manifest
        self.shapes: dict[str, list[int]] = manifest["shapes"]
        self._pieces: dict[str, list[tuple[int, int, TensorFile]]] = {}
        for file, record in manifest["files"].items():
            path = folder / file
            if not path.is_file() or path.stat().st_size != record["bytes"]:
                found = (
                    f"has {path.stat().st_size} bytes instead of the {record['bytes']} that were "
                    "written"
                    if path.is_file()
                    else "is missing"
                )
                raise SettingsError(str(path), f"{found}; the checkpoint cannot be used.")
            tensors = TensorFile(path)
            try:
                starts = read_json(tensors.metadata["starts"])
                for name, entry in tensors.entries.items():
                    start, count = starts[name.split("/", 1)[1]], math.prod(entry.shape)
                    if type(start) is not int or start < 0:
                        raise ValueError
                    self._pieces.setdefault(name, []).append((start, count, tensors))
            except (ValueError, KeyError, IndexError, TypeError):
                raise SettingsError(
                    str(path), "does not say where its pieces start; the checkpoint cannot be used."
                ) from None
        self._check_pieces()

    def verify(self, share: slice = slice(None)) -> None:
        """Compares the hash of every file, or of those in `share`; raises SettingsError that names
        one that differs."""
        for file in sorted(self.manifest["files"])[share]:
            self._verify_file(file)

    def verify_once(self) -> None:
        """As `verify`, but for files that were found right before and have not been touched since,
        which a record beside them says; where it cannot be written, all are read again the next
        time."""
        record = self.folder / VERIFIED
        known = _read_record(record)
        found = {}
        for file in sorted(self.manifest["files"]):
            state = _state_of(self.folder / file, self.manifest["files"][file]["hash"])
            if known.get(file) != state:
                self._verify_file(file)
            found[file] = state
        if known != found:
            try:
                replace_text(record, json.dumps(found, indent=1) + "\n")
            except OSError:
                pass

    def _verify_file(self, file: str) -> None:
        if digest_of(self.folder / file) != self.manifest["files"][file]["hash"]:
            raise SettingsError(
                str(self.folder / file),
                "does not hold what was written: its hash differs; the checkpoint cannot be used.",
            )

    def _check_pieces(self) -> None:
        """No value is given twice: then another one would be missing, and be read as whatever lay
        in memory."""
        for name, pieces in self._pieces.items():
            end = 0
            for start, count, tensors in sorted(pieces, key=lambda piece: piece[:2]):
                if start < end:
                    raise SettingsError(
                        str(tensors.path),
                        f"holds values of {name} that another piece holds too; the checkpoint "
                        "cannot be used.",
                    )
                end = start + count

    def holds(self, kind: str) -> bool:
        return any(name.startswith(f"{kind}/") for name in self._pieces)

    def read(self, kind: str, name: str) -> torch.Tensor:
        """The whole fp32 tensor."""
        shape = self.shapes[name]
        return self.read_flat(kind, name, 0, math.prod(shape)).view(shape)

    def read_flat(self, kind: str, name: str, start: int, count: int) -> torch.Tensor:
        """[count]: values `start` to `start + count` of the flattened tensor, from the pieces that
        hold them."""
        values, found = torch.empty(count), 0
        for first, last, piece_start, tensors in self._overlaps(
            f"{kind}/{name}", start, start + count
        ):
            values[first - start : last - start] = tensors.read_flat(
                f"{kind}/{name}", first - piece_start, last - first
            )
            found += last - first
        if found != count:
            raise SettingsError(
                str(self.folder),
                f"holds {found} of {count} values of {kind}/{name}; the checkpoint cannot be used.",
            )
        return values

    def _overlaps(
        self, key: str, start: int, end: int
    ) -> Iterator[tuple[int, int, int, TensorFile]]:
        for piece_start, count, tensors in self._pieces.get(key, []):
            first, last = max(start, piece_start), min(end, piece_start + count)
            if first < last:
                yield first, last, piece_start, tensors
