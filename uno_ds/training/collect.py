"""Copies to one place the files of a checkpoint that several machines wrote to their own disks."""

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from uno_ds.model.tensor_file import digest_of, sync_folder
from uno_ds.settings import SettingsError
from uno_ds.training.checkpoint_file import open_checkpoint
from uno_ds.training.manifest import MANIFEST, files_elsewhere, read_manifest

SCP = ("scp", "-q", "-p", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20")


@dataclass(frozen=True)
class Place:
    """A folder of this machine, or of `host`, which is reached by ssh without a password."""

    folder: Path
    host: str = ""

    def __str__(self) -> str:
        return f"{self.host}:{self.folder}" if self.host else str(self.folder)

    def copy(self, file: str, target: Path) -> str:
        """Why the file could not be copied to `target`, in one line; empty if it was."""
        if not self.host:
            try:
                shutil.copyfile(self.folder / file, target)
            except OSError as error:
                return f"{error.strerror or error}"
            return ""
        command = [*SCP, "--", f"{self.host}:{self.folder / file}", str(target)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return "there is no scp (Debian: openssh-client)"
        said = " ".join(done.stderr.split())
        return "" if done.returncode == 0 else said or f"scp ended with code {done.returncode}"


def read_place(text: str, folder: Path) -> Place:
    """`DIR`, `HOST:DIR`, or `HOST`, whose folder is then `folder`. Raises SettingsError."""
    if text and Path(text).is_dir():
        return Place(Path(text))
    host, _, given = text.partition(":")
    # A name that looks like an option would be one to scp.
    if re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9._-]*", host):
        return Place(Path(given) if given else folder.resolve(), host)
    raise SettingsError(
        "--from", f"'{text}' is neither a folder nor a machine; give DIR, HOST or HOST:DIR."
    )


def collect(
    checkpoint: Path, places: Sequence[str], report: Callable[[str], None]
) -> tuple[Path, int]:
    """Completes the checkpoint in its own folder, from `places` or, if none is given, from the same
    folder of the machines that wrote the files; returns (folder, number of files copied).

    Whatever is copied is compared with its hash first. A folder without a manifest gets that of the
    first place, as a last step. Raises SettingsError that names what is still missing; what was
    copied stays."""
    folder, fetched = checkpoint, None
    if places and re.fullmatch(r"step_[0-9]+", folder.name) and not (folder / MANIFEST).exists():
        fetched = _fetch_manifest(folder, read_place(places[0], folder))
        manifest = read_manifest(fetched)
    else:
        folder, manifest = open_checkpoint(checkpoint, "CHECKPOINT")
    given = [read_place(text, folder) for text in places]
    hosts = manifest.get("hosts", {})
    absent = [file for file in sorted(manifest["files"]) if not (folder / file).exists()]
    for file in absent:
        own = [Place(folder.resolve(), hosts[file])] if file in hosts else []
        _copy(folder, file, manifest["files"][file], given or own, report)
    if fetched is not None:
        fetched.rename(folder / MANIFEST)
    sync_folder(folder)
    assert not files_elsewhere(folder, manifest)
    return folder, len(absent)


def _fetch_manifest(folder: Path, place: Place) -> Path:
    """The place's manifest, under another name in the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(str(folder), f"cannot be made: {error.strerror}.") from None
    fetched = folder / f".{MANIFEST}.part"
    problem = place.copy(MANIFEST, fetched)
    if problem:
        raise SettingsError("--from", f"{place} gave no {MANIFEST}: {problem}.")
    try:
        read_manifest(fetched)
    except ValueError as error:
        fetched.unlink()
        raise SettingsError("--from", f"{place}/{MANIFEST} {error}") from None
    return fetched


def _copy(
    folder: Path,
    file: str,
    record: dict[str, int | str],
    places: Sequence[Place],
    report: Callable[[str], None],
) -> None:
    """Raises SettingsError if none of the places has the file."""
    partial, problems = folder / f".{file}.part", []
    for place in places:
        problem = place.copy(file, partial)
        if not problem and digest_of(partial) != record["hash"]:
            problem = "does not hold what was written: its hash differs"
        if not problem:
            partial.rename(folder / file)
            report(f"{folder / file}: from {place}, {record['bytes']:,} bytes")
            return
        partial.unlink(missing_ok=True)
        problems.append(f"{place}: {problem}")
    tried = f" ({'; '.join(problems)})" if problems else ""
    raise SettingsError(
        str(folder / file),
        f"was found nowhere{tried}; name with --from the machine or folder that has it.",
    )
