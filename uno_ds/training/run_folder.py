"""A run's folder belongs to one run at a time, and what an earlier one left there is moved, never
overwritten."""

import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uno_ds.files_on_disk import replace_text
from uno_ds.settings import SettingsError
from uno_ds.training.checkpoint_file import (
    complete_checkpoints,
    outside_of,
    point_latest_at,
    step_of,
)

LOCK, REPLACED, SET_ASIDE = "run.lock", "replaced_", "set_aside_"
# The holder of a lock touches it so often. Another machine's processes cannot be looked up: one
# that has not touched its lock for SILENCE seconds, on the clock of whoever waits, is taken for
# dead.
BEAT, SILENCE = 5.0, 30.0
# How long a run that goes on waits for ranks of the start before it that are still ending.
PATIENCE = 60.0


def new_run_id() -> str:
    """Of one start of a run: its time in UTC, and eight random digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


def check_folder(folder: Path, resume: str, overwrite: bool) -> None:
    """Raises SettingsError if a start with these flags would overwrite what an earlier run left in
    its folder."""
    if overwrite and resume == "auto":
        raise SettingsError(
            "--overwrite", "starts anew, and --resume auto goes on; give one of the two."
        )
    inside = resume not in ("auto", "never") and _is_inside(Path(resume), folder)
    if overwrite and inside:
        raise SettingsError(
            "--overwrite", f"would move {resume}, which --resume names, aside; give one of the two."
        )
    left = _left_in(folder)
    if not left or overwrite or inside or resume == "auto":
        return
    raise SettingsError(
        "--resume" if resume != "never" else "output",
        f"{folder} holds {left} of an earlier run; --resume auto goes on from there, --overwrite "
        "moves what the folder holds into "
        f"{folder / REPLACED}... and starts anew, another name (--set name=...) leaves it alone.",
    )


def check_overwrite(folder: Path, used: dict[str, Path]) -> None:
    """`used`: files and folders that the run reads, by the key that names them. Raises
    SettingsError if --overwrite would move one of them."""
    for key, path in used.items():
        if _is_inside(path, folder):
            raise SettingsError(
                "--overwrite",
                f"would move {path} aside, which {key} names; copy it to another place, or give "
                "the run another name.",
            )


def replace_run(folder: Path, run_id: str) -> Path | None:
    """Moves what an earlier run left into a new folder below `folder`, which is returned; None if
    there was nothing."""
    left = [
        path
        for path in sorted(folder.iterdir())
        if path.name != LOCK and not path.name.startswith(REPLACED)
    ]
    if not left:
        return None
    aside = folder / f"{REPLACED}{run_id}"
    aside.mkdir()
    # Checkpoints last: cut off before them, the folder still holds a run, and the next start asks
    # again.
    for path in sorted(left, key=lambda path: path.name == "checkpoints"):
        path.rename(aside / path.name)
    return aside


def continue_from(checkpoint: Path, folder: Path, run_id: str) -> str | None:
    """Makes `checkpoint` the newest of the run's checkpoints in `folder`: what is not on the way to
    it is moved aside, with the metrics as they are, and `latest` names it, if it lies there.
    Returns a line about what was moved, if anything was."""
    outside = outside_of(folder, checkpoint)
    aside = folder / f"{SET_ASIDE}{run_id}"
    if outside:
        aside.mkdir()
        metrics = folder.parent / "metrics.jsonl"
        if metrics.exists():
            shutil.copy2(metrics, aside)
    for path in outside:
        path.rename(aside / path.name)
    if checkpoint.parent.resolve() == folder.resolve():
        point_latest_at(checkpoint)
    names = ", ".join(path.name for path in outside)
    return (
        f"--resume: {names} moved to {aside}; remove it when you need it no more" if names else None
    )


class RunLock:
    """Keeps other runs out of a run's folder, until `release` or the end of the process.

    The lock is a file that names the process. A process of this machine is looked up; one that
    cannot be seen from here, of another machine or container, is known by the times at which it
    touches the file.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        *,
        patience: float = 0.0,
        silence: float = SILENCE,
        beat: float = BEAT,
        report: Callable[[str], None] = print,
    ):
        """patience: seconds to wait for a run that holds the folder and is alive."""
        self.path, self.run_id = folder / LOCK, run_id
        self._patience, self._silence, self._beat, self._report = patience, silence, beat, report
        self._content = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "process_start": _start_of(os.getpid()),
            "machine": _machine(),
            "run": run_id,
        }
        self._released = threading.Event()

    def acquire(self) -> None:
        """Raises SettingsError if another run holds the folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begun = since = time.monotonic()
        seen: tuple[Any, int] | None = None
        touched = waiting = False
        while not self._create():
            found = self._read()
            if found is None:
                continue
            if found != seen:
                touched = seen is not None and found[0] == seen[0]
                seen, since = found, time.monotonic()
            here = _is_running(found[0])
            silent = time.monotonic() - since >= self._silence
            if here is False or here is None and silent:
                self._remove(found[0])
                self._report(
                    f"the lock of {self.path.parent} was left by {_holder(found[0])}, which is gone"
                )
            elif (here or touched) and time.monotonic() - begun >= self._patience:
                raise SettingsError(
                    str(self.path),
                    f"another run, {_holder(found[0])}, writes this folder; wait for its end, stop "
                    "it, or give this run another "
                    "name (--set name=...).",
                )
            else:
                if not waiting:
                    self._report(
                        f"waits up to {max(self._patience, 2 * self._silence):.0f} s for "
                        f"{_holder(found[0])}, which holds {self.path}"
                    )
                waiting = True
                time.sleep(0.2)
        threading.Thread(target=self._keep, name="run lock", daemon=True).start()

    def release(self) -> None:
        """May be called when nothing was acquired."""
        self._released.set()
        if self._is_ours():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """The file appears with its content, at once, whoever else tries."""
        text = json.dumps(self._content) + "\n"
        partial = self.path.with_name(f".{LOCK}.{self.run_id}")
        replace_text(partial, text, synced=True)
        try:
            os.link(partial, self.path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            try:
                with self.path.open("x") as stream:
                    stream.write(text)
            except FileExistsError:
                pass
        finally:
            partial.unlink(missing_ok=True)
        return self._is_ours()

    def _read(self) -> tuple[Any, int] | None:
        """What the lock says, None if it cannot be read, and when it was touched; None if there is
        no lock."""
        try:
            # Opened anew each time: network file systems look the times up then.
            with self.path.open() as stream:
                text, touched = stream.read(10_000), os.fstat(stream.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        try:
            return json.loads(text), touched
        except ValueError:
            return None, touched

    def _is_ours(self) -> bool:
        found = self._read()
        return found is not None and found[0] == self._content

    def _remove(self, stale: Any) -> None:
        """Removes the lock if it still is the stale one. Runs that find it stale at once take
        turns: none of them removes a lock that another has just created in its place."""
        with self.path.with_name(f".{LOCK}.turns").open("a") as turns:
            try:
                fcntl.flock(turns, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks: two starts within a moment may both go on
            found = self._read()
            if found is not None and found[0] == stale:
                self.path.unlink(missing_ok=True)

    def _keep(self) -> None:
        """Touches the lock, and ends the process if another run took it, as one may after a
        standstill of SILENCE seconds."""
        while not self._released.wait(self._beat):
            try:
                found = self._read()
                if found is not None and found[0] == self._content:
                    os.utime(self.path)
            except OSError:
                continue
            if found is not None and found[0] != self._content and not self._released.is_set():
                print(
                    f"error: {self.path}: taken by {_holder(found[0])} while this run stood "
                    "still; it ends here.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def _left_in(folder: Path) -> str:
    """In words, what the folder holds that a run from step 1 would overwrite; empty if nothing."""
    checkpoints = folder / "checkpoints"
    steps = [step_of(path) for path in complete_checkpoints(checkpoints)]
    steps += [
        step_of(path)
        for path in checkpoints.glob("step_*")
        if re.fullmatch(r"step_\d+", path.name) and path.is_dir()
    ]
    parts = [f"checkpoints up to step {max(steps)}"] if steps else []
    parts += ["the exported model"] if (folder / "model").exists() else []
    return " and ".join(parts)


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether --overwrite on `folder` would move `path`."""
    try:
        below = path.resolve().relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False
    return not below.parts or not below.parts[0].startswith(REPLACED)


def _holder(content: Any) -> str:
    if not isinstance(content, dict):
        return "an unknown process"
    return f"process {content.get('process')} on {content.get('host')}"


def _is_running(content: Any) -> bool | None:
    """Whether the process that a lock names is there; None if that cannot be seen from here."""
    if not isinstance(content, dict) or content.get("machine") != _machine():
        return None
    process = content.get("process")
    start = _start_of(process) if isinstance(process, int) else None
    return start is not None and start == content.get("process_start")


def _machine() -> str:
    """Where process ids mean the same: host, its start, and container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = container = "unknown"
    return f"{socket.gethostname()} {boot} {container}"


def _start_of(process: int) -> str | None:
    """When the process started, in the machine's ticks; None if it has ended."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return "unknown"
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZX" else start
