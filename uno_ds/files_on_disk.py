"""Opening files that a user names, and replacing files atomically.

Regular files only are opened, so that a named pipe or a device in a file's place never blocks:
`open` waits on a named pipe until somebody writes to it, and reads a device such as /dev/zero
without end."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def open_regular(path: str | Path, mode: str = "rb", **keywords: Any) -> IO[Any]:
    """As `open` for reading (`keywords` are open's own: buffering, encoding, ...), of regular files
    and links to them.

    Never blocks. Raises OSError and nothing else; `strerror` says what is wrong, "is a named pipe,
    not a regular file" included."""
    assert mode in ("r", "rt", "rb"), mode
    try:
        # Before it is opened: a socket cannot be, and a device may act on it.
        _refuse_other_kinds(os.stat(path).st_mode, path)
        return open(path, mode, opener=_open_without_waiting, **keywords)
    except ValueError as error:  # a NUL character or a lone surrogate in the name
        raise OSError(errno.EINVAL, f"is not a possible file name ({error})", str(path)) from None


def read_regular(path: str | Path, limit: int | None = None) -> bytes:
    """The bytes of a regular file. Raises OSError as `open_regular`, and if it has more than
    `limit` bytes."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if limit is not None and size > limit:
            reason = f"has {size} bytes, more than the {limit} that are read"
            raise OSError(errno.EFBIG, reason, str(path))
        return stream.read()


@contextmanager
def replacing(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A new name in the folder of `path` to write a file to, which replaces `path` atomically when
    the block ends: a reader finds the old content or all of the new. If the block raises, the
    partial file is removed and `path` stays as it was. synced: the content is on the disk first.
    Raises OSError."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield partial
        if synced:
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str, *, synced: bool = False) -> None:
    """Replaces a file by UTF-8 text, as `replacing` does."""
    with replacing(path, synced=synced) as partial:
        partial.write_text(text, encoding="utf-8")


def _open_without_waiting(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _refuse_other_kinds(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_other_kinds(mode: int, path: str | Path) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((words for matches, words in _KINDS if matches(mode)), "something else")
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(code, f"is {kind}, not a regular file", str(path))
