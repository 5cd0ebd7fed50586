"""Files that a run appends to, tolerant of a full disk and of a deleted folder."""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from uno_ds.files_on_disk import replace_text


class AppendFile:
    """Appends bytes. What cannot be written is kept in memory and written by a later `write`, and a
    file that was deleted is written again; `warn` receives one line when either begins. Raises
    OSError only if the file cannot be created."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path, self._warn = path, warn
        self._unwritten = bytearray()
        self._is_failing = self._is_lost = False
        self._stream = self._open()

    @property
    def complete(self) -> bool:
        """Whether all that was appended is in the file."""
        return not self._unwritten and not self._is_lost

    def write(self, content: bytes) -> None:
        self._unwritten += content
        try:
            if not self.path.exists():
                self._create_again()
            while self._unwritten:
                count = self._stream.write(self._unwritten)
                del self._unwritten[:count]
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                self._warn(
                    f"WARNING: {self.path} cannot be written: {error.strerror or error}. The run "
                    "continues, keeps the lines in memory and tries again."
                )
            self._is_failing = True

    def close(self) -> None:
        """Tries once more to write what is left."""
        self.write(b"")
        try:
            self._stream.close()
        except OSError:
            # A network file system may report only here that its disk is full.
            self._is_lost = True

    def _open(self) -> BinaryIO:
        # Unbuffered, so that `write` returns how many bytes are in the file.
        return self.path.open("a+b", buffering=0)

    def _create_again(self) -> None:
        """The content of the deleted file can still be read while it is open, at least on a local
        disk."""
        try:
            self._stream.seek(0)
            before = self._stream.read()
        except OSError:
            before = b""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deleted, self._stream = self._stream, self._open()
        self._unwritten[:0] = before
        self._warn(f"WARNING: {self.path} was deleted during the run; it is written again.")
        deleted.close()


def print_line(line: str) -> None:
    """Prints a line; on a full disk it is lost, which is no error."""
    try:
        print(line, flush=True)
    except OSError:
        pass


def write_exit(path: Path | None, code: int, reason: str, replace: bool = True) -> None:
    """Writes `CODE REASON` in one line, for the script that started the run: launchers such as
    torchrun replace every exit code of a rank by 1. Does nothing without a path, nor, without
    `replace`, where another rank has written; a failure prints a warning."""
    if path is None:
        return
    line = f"{code} {' '.join(reason.split())}\n"
    try:
        if replace:
            replace_text(path, line)
            return
        with path.open("x", encoding="utf-8") as file:
            file.write(line)
    except FileExistsError:
        pass
    except OSError as error:
        print_line(f"warning: --exit-file {path} cannot be written: {error.strerror or error}.")
