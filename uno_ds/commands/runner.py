"""What the command lines do alike before they start their work."""

import faulthandler
from collections.abc import Iterable

from uno_ds.data.sources import Source, file_notes, file_warnings


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
