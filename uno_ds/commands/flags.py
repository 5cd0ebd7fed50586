"""What the command lines share: a mistake in a flag is a SettingsError, one line, as a mistake in a
recipe is."""

import argparse
from typing import NoReturn

from uno_ds.settings import SettingsError

MOST_RANKS = 1_000_000


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError("command line", f"{message}; see --help.")


def check_ranks(parser: Parser, ranks: int | None) -> None:
    """Refuses a --world-size, if one is given, that no run has."""
    if ranks is not None and not 1 <= ranks <= MOST_RANKS:
        parser.error(f"--world-size must be 1 to {MOST_RANKS:,}, got {ranks}")
