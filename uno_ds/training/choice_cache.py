"""The file in which findings about kernel backends are kept for later starts."""

import json
from pathlib import Path
from typing import Any

from uno_ds.files_on_disk import replace_text

NAME = "kernels.json"
# The newest are kept.
MOST_ENTRIES = 100


class ChoiceCache:
    """A list of {key, findings} in FOLDER/kernels.json. It is a convenience: what cannot be read
    is checked again, and what cannot be written is not kept."""

    def __init__(self, folder: str | None):
        """None: nothing is kept."""
        self.file = None if folder is None else Path(folder).expanduser() / NAME

    def read(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The findings of this key, if there are any."""
        for entry in reversed(self._entries()):
            if entry["key"] == _plain(key):
                found: dict[str, Any] = entry["findings"]
                return found
        return None

    def write(self, key: dict[str, Any], findings: dict[str, Any]) -> str | None:
        """Adds them, replacing the file at once; why that was not possible, or None."""
        if self.file is None:
            return None
        others = [entry for entry in self._entries() if entry["key"] != _plain(key)]
        entries = [*others, {"key": _plain(key), "findings": findings}][-MOST_ENTRIES:]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.file, json.dumps(entries, indent=1))
        except OSError as error:
            return f"{self.file} cannot be written: {error.strerror or error}"
        return None

    def _entries(self) -> list[dict[str, Any]]:
        if self.file is None:
            return []
        try:
            entries = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        if not isinstance(entries, list):
            return []
        return [
            entry
            for entry in entries
            if isinstance(entry, dict)
            and isinstance(entry.get("key"), dict)
            and isinstance(entry.get("findings"), dict)
        ]


def _plain(key: dict[str, Any]) -> Any:
    """As it is when it has been in a file."""
    return json.loads(json.dumps(key))
