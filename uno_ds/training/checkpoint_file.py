"""A checkpoint on disk: its manifest, and its tensors assembled from the pieces of all ranks.
Needs no DeepSpeed.

step_N/rank_00000.safetensors ...   the pieces that each rank owned, flat and in fp32: weight/NAME,
                                    exp_avg/NAME, exp_avg_sq/NAME, average/NAME; the header holds
                                    the start of each piece in the flattened parameter
step_N/manifest.json                everything that is not a tensor, and size and hash of every
                                    other file
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uno_ds.files_on_disk import replace_text
from uno_ds.json_text import read_json
from uno_ds.model.tensor_file import TensorFile, digest_of, sync_folder
from uno_ds.settings import SettingsError
from uno_ds.training.manifest import MANIFEST, files_elsewhere, read_manifest, scattered

LATEST = "latest"
# Files added to a checkpoint after it was written: sound steps followed it, or its weights are in
# doubt, with the reason.
PROVEN, DOUBT = "proven", "doubt"
# Files whose hashes were verified, with their size and times then.
VERIFIED = "verified.json"
WEIGHT, MOMENTS, AVERAGE = "weight", ("exp_avg", "exp_avg_sq"), "average"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05}.safetensors"


def part_of(final: Path) -> Path:
    """Where a checkpoint is written before it is renamed to `final`."""
    return final.with_name(f".{final.name}.part")


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, complete or not."""
    found = re.search(r"step_([0-9]+)", path.name)
    assert found is not None, f"{path} is not named like a checkpoint"
    return int(found[1])


@dataclass(frozen=True)
class Lineage:
    """The start of a run that wrote a checkpoint, and the earlier starts that it continued from.

    Every start has its own run id. before: (run id, last step used of it) of the earlier starts,
    oldest first. Checkpoints of versions that wrote no run id have an empty one.
    """

    run_id: str
    before: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Lineage":
        """Raises ValueError, KeyError or TypeError if the manifest holds no valid lineage."""
        given = manifest.get("run", {"id": "", "before": []})
        before = tuple((str(run_id), int(step)) for run_id, step in given["before"])
        return cls(str(given["id"]), before)

    def plain(self) -> dict[str, Any]:
        """The entry "run" of a manifest."""
        return {"id": self.run_id, "before": [list(start) for start in self.before]}

    def continued(self, step: int, run_id: str) -> "Lineage":
        """The lineage of the start `run_id` that continues after `step` of this one."""
        return Lineage(run_id, (*self.before, (self.run_id, step)))

    def includes(self, other: "Lineage", step: int) -> bool:
        """Whether checkpoint `step` of `other` is an ancestor of later checkpoints of this
        lineage."""
        if other.run_id == self.run_id:
            return True
        return any(run_id == other.run_id and step <= last for run_id, last in self.before)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, sorted by step. The manifest is written last, so a partial folder
    that has one counts: only its rename is missing."""
    complete = [
        path
        for path in folder.glob("step_*")
        if re.fullmatch(r"step_[0-9]+", path.name) and (path / MANIFEST).exists()
    ]
    complete += _complete_partials(folder)
    return sorted(complete, key=step_of)


def newest_first(folder: Path) -> tuple[list[Path], list[str]]:
    """(the complete checkpoints that a run may continue from, newest first; a line with the reason
    for each of the others).

    The newest one is the one that `latest` names, or one of a higher step that was written later by
    the same training according to its manifest (its save was interrupted before `latest` was
    updated). File times are not used: copies change them. A checkpoint whose manifest cannot be
    read keeps its place in the order.
    """
    paths = list(reversed(complete_checkpoints(folder)))
    found = {path: _lineage_at(path) for path in paths}
    lineages = {path: lineage for path, lineage in found.items() if lineage is not None}
    if not lineages:
        return paths, []
    named = _step_of_latest(folder)
    reached = [path for path in lineages if named is None or step_of(path) <= named]
    reference = next(iter(reached or lineages))
    usable, others = [], []
    for path in paths:
        lineage = lineages.get(path)
        if lineage is None or path == reference:
            usable.append(path)
            continue
        first, last = sorted((path, reference), key=step_of)
        related = lineages[last].includes(lineages[first], step_of(first))
        # Without run ids a higher step may also be left from a run that was started again.
        unknown = step_of(path) > step_of(reference) and not lineage.run_id
        if related and not unknown:
            usable.append(path)
        else:
            others.append(
                f"{path.name}: {LATEST} names step_{named}, and by their manifests another start "
                f"of the run wrote {path.name}."
            )
    return usable, others


def not_ancestors_of(chosen: Path, folder: Path) -> list[Path]:
    """The checkpoints in `folder` that a run which continues from `chosen` does not build on: those
    of the same or a higher step, complete or not, without `chosen` itself, and complete ones of
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
    """The step that `latest` names, whether its checkpoint exists or not; None if it names none."""
    try:
        named = re.fullmatch(r"step_(\d{1,18})", (folder / LATEST).read_text().strip())
    except (OSError, ValueError):
        return None
    return int(named[1]) if named else None


def rename_complete_partials(folder: Path) -> None:
    """Finishes saves that were interrupted just before the rename."""
    for partial in _complete_partials(folder):
        partial.rename(folder / f"step_{step_of(partial)}")


def leftovers(folder: Path) -> list[Path]:
    """Folders left by interrupted saves and removals; anything else belongs to the user."""
    return [
        path
        for path in folder.glob(".step_*")
        if re.fullmatch(r"\.step_[0-9]+\.(part|old)", path.name) and path.is_dir()
    ]


def point_latest_at(checkpoint: Path) -> None:
    """Writes the name of this checkpoint into the file `latest` of its folder, atomically and
    synced."""
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
    """Values that change when a file is written to, replaced or copied, and its expected hash."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, digest]


def _read_record(path: Path) -> dict[str, Any]:
    record = None
    with suppress(OSError, ValueError):
        record = read_json(path.read_bytes()) if path.is_file() else None
    return record if isinstance(record, dict) else {}


def _complete_partials(folder: Path) -> list[Path]:
    """Partial folders that have a manifest, so that only their rename is missing."""
    return [
        partial
        for partial in folder.glob(".step_*.part")
        if re.fullmatch(r"\.step_[0-9]+\.part", partial.name)
        and (partial / MANIFEST).exists()
        and not (folder / f"step_{step_of(partial)}").exists()
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
    """Trained parameters, moments and averages of a checkpoint, whole or in part, whatever ranks
    and stage wrote them. Only the requested values are read."""

    def __init__(self, folder: Path, manifest: dict[str, Any], *, of_this_machine: bool = False):
        """Raises SettingsError if a file is missing or has another size than when it was written;
        `of_this_machine`: files that other machines wrote to their own disks may be missing."""
        self.folder, self.manifest = folder, manifest
        self.elsewhere = files_elsewhere(folder, manifest)
        if self.elsewhere and not of_this_machine:
            raise scattered(folder, manifest)
        self.files = sorted({*manifest["files"]}.difference(self.elsewhere))
        self.shapes: dict[str, list[int]] = manifest["shapes"]
        # (start in the flattened tensor, size, file) of each piece, by KIND/NAME.
        self._pieces: dict[str, list[tuple[int, int, TensorFile]]] = {}
        for file in self.files:
            self._add_file(folder / file, manifest["files"][file]["bytes"])
        self._check_pieces()

    def _add_file(self, path: Path, size: int) -> None:
        """size: bytes that were written."""
        problem = None
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != size:
            problem = f"has {path.stat().st_size} bytes instead of the {size} that were written"
        if problem is not None:
            raise SettingsError(str(path), f"{problem}; the checkpoint cannot be used.")
        tensors = TensorFile(path)
        try:
            starts = read_json(tensors.metadata["starts"])
            for name, entry in tensors.entries.items():
                start = starts[name.split("/", 1)[1]]
                if type(start) is not int or start < 0:
                    raise ValueError
                piece = (start, math.prod(entry.shape), tensors)
                self._pieces.setdefault(name, []).append(piece)
        except (ValueError, KeyError, IndexError, TypeError):
            raise SettingsError(
                str(path), "does not say where its pieces start; the checkpoint cannot be used."
            ) from None

    def verify(self, share: slice = slice(None)) -> None:
        """Compares the hash of every file, or of those in `share`; raises SettingsError that names
        one that differs."""
        for file in self.files[share]:
            self._verify_file(file)

    def verify_once(self) -> None:
        """As `verify`, but skips files that were verified before and have not changed since,
        according to the record VERIFIED. If the record cannot be written, all files are read again
        the next time."""
        record = self.folder / VERIFIED
        known = _read_record(record)
        found = {}
        for file in sorted(self.manifest["files"]):
            state = _state_of(self.folder / file, self.manifest["files"][file]["hash"])
            if known.get(file) != state:
                self._verify_file(file)
            found[file] = state
        if known != found:
            with suppress(OSError):
                replace_text(record, json.dumps(found, indent=1) + "\n")

    def _verify_file(self, file: str) -> None:
        if digest_of(self.folder / file) != self.manifest["files"][file]["hash"]:
            raise SettingsError(
                str(self.folder / file),
                "does not hold what was written: its hash differs; the checkpoint cannot be used.",
            )

    def _check_pieces(self) -> None:
        """Raises SettingsError if pieces overlap: their sizes could add up although values are
        missing."""
        for name, pieces in self._pieces.items():
            end = 0
            for start, size, tensors in sorted(pieces, key=lambda piece: piece[:2]):
                if start < end:
                    raise SettingsError(
                        str(tensors.path),
                        f"holds values of {name} that another piece holds too; the checkpoint "
                        "cannot be used.",
                    )
                end = start + size

    def holds(self, kind: str) -> bool:
        return any(name.startswith(f"{kind}/") for name in self._pieces)

    def read(self, kind: str, name: str) -> torch.Tensor:
        """The whole fp32 tensor."""
        shape = self.shapes[name]
        return self.read_flat(kind, name, 0, math.prod(shape)).view(shape)

    def read_flat(self, kind: str, name: str, start: int, count: int) -> torch.Tensor:
        """[count]: values `start` to `start + count` of the flattened tensor, from the pieces that
        hold them."""
        key = f"{kind}/{name}"
        values = torch.empty(count)
        found = 0
        for first, last, piece_start, tensors in self._overlaps(key, start, start + count):
            overlap = tensors.read_flat(key, first - piece_start, last - first)
            values[first - start : last - start] = overlap
            found += last - first
        if found != count:
            if self.elsewhere:
                raise scattered(self.folder, self.manifest)
            raise SettingsError(
                str(self.folder),
                f"holds {found} of {count} values of {key}; the checkpoint cannot be used.",
            )
        return values

    def _overlaps(
        self, key: str, start: int, end: int
    ) -> Iterator[tuple[int, int, int, TensorFile]]:
        for piece_start, count, tensors in self._pieces.get(key, []):
            first, last = max(start, piece_start), min(end, piece_start + count)
            if first < last:
                yield first, last, piece_start, tensors
