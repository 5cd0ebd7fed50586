"""What the command lines of the benchmarks share."""

from collections.abc import Collection

from uno_ds.commands.flags import Parser
from uno_ds.settings import SettingsError

__all__ = ["Parser", "names_of"]


def names_of(flag: str, text: str, allowed: Collection[str]) -> list[str]:
    """The names in `text`, separated by commas; of an empty text none. Raises SettingsError that
    names the flag for names that are not allowed."""
    names = text.split(",") if text else []
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise SettingsError(
            flag, f"{', '.join(unknown)} is unknown here; allowed are {', '.join(allowed)}."
        )
    return names
