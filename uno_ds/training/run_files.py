"""A file that a run appends to for days, on a disk that may fill up or under a folder that may be
deleted."""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from uno_ds.files_on_disk import replace_text


class AppendFile:
    """Appends bytes. What the disk does not take is kept in memory and tried again with the next
    `write`, and a file that was deleted is written again; `warn` gets one line when either begins.
    Raises OSError only where it cannot be made at first."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path, self._warn = path, warn
        self._left, self._failing, self._lost = bytearray(), False, False
        self._stream = self._open()

    @property
    def complete(self) -> bool:
        """Whether all that was appended is in the file."""
        return not self._left and not self._lost

    def write(self, content: bytes) -> None:
        self._left += content
        try:
            if not self.path.exists():
                self._write_again()
            while self._left:
                count = self._stream.write(self._left)
                del self._left[:count]
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._warn(
                    f"WARNING: {self.path} cannot be written: {error.strerror or error}. The run "
                    "goes on, keeps the lines "
                    "in memory and tries again."
                )
            self._failing = True

    def close(self) -> None:
        """Tries once more to write what is left."""
        self.write(b"")
        try:
            self._stream.close()
        except OSError:
            # A network's disk reports here that it was full.
            self._lost = True

    def _open(self) -> BinaryIO:
        # Unbuffered, so that what has been written is known to the byte.
        return self.path.open("a+b", buffering=0)

    def _write_again(self) -> None:
        """What the deleted file held is still there as long as it is open, at least on a local
        disk."""
        try:
            self._stream.seek(0)
            before = self._stream.read()
        except OSError:
            before = b""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deleted, self._stream = self._stream, self._open()
        self._left[:0] = before
        self._warn(f"WARNING: {self.path} was deleted during the run; it is written again.")
        deleted.close()


def print_line(line: str) -> None:
    """Prints a line; a log on a full disk loses it, and ends nothing."""
    try:
        print(line, flush=True)
    except OSError:
        pass


def write_exit(path: Path | None, code: int, reason: str) -> None:
    """`CODE REASON` in one line, for the script that started the run: launchers such as torchrun
    make 1 of every exit code of a rank. Nothing without a path; a failure is a warning, since the
    exit code is the same."""
    if path is None:
        return
    try:
        replace_text(path, f"{code} {' '.join(reason.split())}\n")
    except OSError as error:
        print_line(f"warning: --exit-file {path} cannot be written: {error.strerror or error}.")
