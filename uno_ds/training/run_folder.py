"""The folder of a run: locked by one run at a time; what an earlier run left there is moved, never
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
from typing import Any, NamedTuple

from uno_ds.files_on_disk import replace_text
from uno_ds.settings import SettingsError
from uno_ds.training.checkpoint_file import (
    complete_checkpoints,
    not_ancestors_of,
    point_latest_at,
    step_of,
)

LOCK, REPLACED, SET_ASIDE = "run.lock", "replaced_", "set_aside_"
# The owner of a lock updates the file's time this often.
HEARTBEAT_SECONDS = 5.0
# Processes of another machine cannot be looked up: an owner there whose lock has not changed for
# this long, on the clock of the process that waits, is considered dead.
STALE_SECONDS = 30.0
# How long a resumed run waits for ranks of its previous start that are still exiting.
WAIT_SECONDS = 60.0


def new_run_id() -> str:
    """Identifies one start of a run: its time in UTC, and eight random digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


def check_folder(folder: Path, resume: str, overwrite: bool) -> None:
    """Raises SettingsError if a start with these flags would overwrite what an earlier run left in
    its folder."""
    if overwrite and resume == "auto":
        raise SettingsError(
            "--overwrite",
            "starts at step 1, and --resume auto continues; give one of the two.",
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
        f"{folder} holds {left} of an earlier run; --resume auto continues from there, "
        f"--overwrite moves the content of the folder into {folder / REPLACED}... and starts at "
        "step 1, another name (--set name=...) keeps it.",
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
    """Moves what an earlier run left into a new folder below `folder` and returns that folder; None
    if there was nothing."""
    left = [
        path
        for path in sorted(folder.iterdir())
        if path.name != LOCK and not path.name.startswith(REPLACED)
    ]
    if not left:
        return None
    aside = folder / f"{REPLACED}{run_id}"
    aside.mkdir()
    # Checkpoints last: if this is interrupted, the folder still holds a run, which the next start
    # does not overwrite either.
    for path in sorted(left, key=lambda path: path.name == "checkpoints"):
        path.rename(aside / path.name)
    return aside


def continue_from(checkpoint: Path, folder: Path, run_id: str) -> str | None:
    """Makes `checkpoint` the newest of the run's checkpoints in `folder`: checkpoints that the run
    does not build on are moved aside, with a copy of the metrics, and `latest` names it, if it is
    in `folder`. Returns a line about what was moved, if anything was."""
    moved = not_ancestors_of(checkpoint, folder)
    aside = folder / f"{SET_ASIDE}{run_id}"
    if moved:
        aside.mkdir()
        metrics = folder.parent / "metrics.jsonl"
        if metrics.exists():
            shutil.copy2(metrics, aside)
    for path in moved:
        path.rename(aside / path.name)
    if checkpoint.parent.resolve() == folder.resolve():
        point_latest_at(checkpoint)
    if not moved:
        return None
    names = ", ".join(path.name for path in moved)
    return f"--resume: {names} moved to {aside}; remove it when it is no longer needed"


class LockState(NamedTuple):
    """content: the JSON in the lock file, None if it is not valid. modified: the file's time in
    ns."""

    content: Any
    modified: int


class RunLock:
    """Keeps other runs out of a run's folder, until `release` or the end of the process.

    The lock is a file that names its owner, a process. A process of this machine is looked up. One
    that cannot be looked up, on another machine or in another container, counts as alive as long as
    it updates the file's time.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        *,
        wait_seconds: float = 0.0,
        stale_seconds: float = STALE_SECONDS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        report: Callable[[str], None] = print,
    ):
        """wait_seconds: how long to wait for an owner that is alive."""
        self.path, self.run_id = folder / LOCK, run_id
        self._wait_seconds, self._stale_seconds = wait_seconds, stale_seconds
        self._heartbeat_seconds, self._report = heartbeat_seconds, report
        self._content = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "process_start": _start_of(os.getpid()),
            "machine": _machine(),
            "run": run_id,
        }
        self._released = threading.Event()

    def acquire(self) -> None:
        """Waits for the lock while its owner may be dead, or for `wait_seconds` while it is alive.
        Raises SettingsError if another run still owns it then."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        last: LockState | None = None
        last_change = started
        has_heartbeat = is_waiting = False
        while not self._try_create():
            state = self._read()
            if state is None:
                continue
            if state != last:
                has_heartbeat = last is not None and state.content == last.content
                last, last_change = state, time.monotonic()
            running = _is_running(state.content)
            now = time.monotonic()
            if running is None and now - last_change >= self._stale_seconds:
                running = False
            if running is False:
                self._remove_stale(state.content)
                self._report(
                    f"removed the lock of {self.path.parent}: its owner, "
                    f"{_owner(state.content)}, is dead"
                )
                continue
            is_alive = running or has_heartbeat
            if is_alive and now - started >= self._wait_seconds:
                raise SettingsError(
                    str(self.path),
                    f"another run, {_owner(state.content)}, writes this folder; wait for its end, "
                    "stop it, or give this run another name (--set name=...).",
                )
            if not is_waiting:
                longest = max(self._wait_seconds, 2 * self._stale_seconds)
                self._report(
                    f"waiting up to {longest:.0f} s for {_owner(state.content)}, which owns "
                    f"{self.path}"
                )
            is_waiting = True
            time.sleep(0.2)
        threading.Thread(target=self._send_heartbeats, name="run lock", daemon=True).start()

    def release(self) -> None:
        """May be called when nothing was acquired."""
        self._released.set()
        if self._is_ours():
            self.path.unlink(missing_ok=True)

    def _try_create(self) -> bool:
        """Creates the file with its content atomically; False if it exists already."""
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

    def _read(self) -> LockState | None:
        """None if there is no lock."""
        try:
            # Opened each time: network file systems refresh the file's times then.
            with self.path.open() as stream:
                text = stream.read(10_000)
                modified = os.fstat(stream.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        try:
            return LockState(json.loads(text), modified)
        except ValueError:
            return LockState(None, modified)

    def _is_ours(self) -> bool:
        state = self._read()
        return state is not None and state.content == self._content

    def _remove_stale(self, content: Any) -> None:
        """Removes the lock if it still has this content. Serialised by a second lock, so that no
        process removes a lock that another one has just created in its place."""
        with self.path.with_name(f".{LOCK}.turns").open("a") as turns:
            try:
                fcntl.flock(turns, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks: two starts at the same moment may both continue
            state = self._read()
            if state is not None and state.content == content:
                self.path.unlink(missing_ok=True)

    def _send_heartbeats(self) -> None:
        """Updates the time of the lock. Ends the process if another run took the lock, which it may
        if this process was suspended for STALE_SECONDS."""
        while not self._released.wait(self._heartbeat_seconds):
            try:
                state = self._read()
                if state is not None and state.content == self._content:
                    os.utime(self.path)
            except OSError:
                continue
            if state is None or state.content == self._content or self._released.is_set():
                continue
            print(
                f"error: {self.path}: taken by {_owner(state.content)} while this run was "
                "suspended; this run ends.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _left_in(folder: Path) -> str:
    """Describes what the folder holds that a run from step 1 would overwrite; empty if nothing."""
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


def _owner(content: Any) -> str:
    if not isinstance(content, dict):
        return "an unknown process"
    return f"process {content.get('process')} on {content.get('host')}"


def _is_running(content: Any) -> bool | None:
    """Whether the process that a lock names is running; None if this machine cannot tell."""
    if not isinstance(content, dict) or content.get("machine") != _machine():
        return None
    process = content.get("process")
    start = _start_of(process) if isinstance(process, int) else None
    return start is not None and start == content.get("process_start")


def _machine() -> str:
    """Identifies the scope of a process id: host, its boot, and container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = container = "unknown"
    return f"{socket.gethostname()} {boot} {container}"


def _start_of(process: int) -> str | None:
    """When the process started, in clock ticks since boot; None if it has ended."""
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
