"""What the command lines share: one-line errors, and what they print of data files."""

import faulthandler
import functools
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec

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
