"""What the command lines share: one-line errors, what they print of data files, and how a process
of several ranks ends."""

import atexit
import contextlib
import faulthandler
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import NoReturn, ParamSpec

from uno_ds.data.source_checks import file_notes, file_warnings
from uno_ds.data.sources import Source
from uno_ds.settings import SettingsError

# The exit code of a user's mistake.
REFUSED = 2

Arguments = ParamSpec("Arguments")


def one_line_errors(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Decorates a command's `main`: a SettingsError is printed as one line, with exit code 2."""

    @functools.wraps(main)
    def guarded(*arguments: Arguments.args, **options: Arguments.kwargs) -> int:
        try:
            return main(*arguments, **options)
        except SettingsError as error:
            print_error(error)
            return REFUSED

    return guarded


def print_error(error: SettingsError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def name_data_files_when_killed() -> None:
    """Lets a process that a library's fault kills print which data file it was reading."""
    if not faulthandler.is_enabled():
        faulthandler.enable()


def print_files(sources: Iterable[Source]) -> None:
    """What was chosen and left out of the files of the sources, and which cannot be read."""
    for source in sources:
        lines = file_notes(source) + [f"warning: {line}" for line in file_warnings(source)]
        for line in lines:
            print(line, flush=True)


def end_process(code: int) -> NoReturn:
    """Ends the process with `code`: waits for its Python threads, runs the exit handlers and writes
    out what was printed, but does not tear the interpreter down. Threads of gloo and NCCL outlive
    their process group, and one that asks for the interpreter meanwhile would abort the process
    (`terminate called without an active exception`), although the run succeeded."""
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)
