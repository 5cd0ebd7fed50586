"""What an inspection has computed, a file for each piece of work, so that a stopped call
continues and ranks share the work without communicating."""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from uno_ds.files_on_disk import replace_text, replacing
from uno_ds.settings import SettingsError, printable

SETTINGS = "settings.json"
# In the header of a file.
VALUES = "values"


class Store:
    """Pieces of work as files in a folder, written atomically: arrays, and plain values as JSON."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """`settings`: what decides the results, plain values. Raises SettingsError if the folder
        holds work of other settings, or cannot be written."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / SETTINGS
            if not path.exists():
                replace_text(path, json.dumps(settings, indent=1) + "\n")
            there = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingsError(
                "--out", f"'{folder}' cannot be written: {error.strerror}."
            ) from None
        except ValueError as error:
            raise SettingsError(
                "--out", f"'{path}' is damaged ({error}); remove '{folder}'."
            ) from None
        for key, value in settings.items():
            given, wanted = (printable(json.dumps(item), 80) for item in (there.get(key), value))
            if there.get(key) != value:
                raise SettingsError(
                    "--out",
                    f"'{folder}' holds an inspection with {key} {given}, this one has {wanted}; "
                    "give another folder, or --overwrite.",
                )

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def write(self, name: str, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Numbers that are not finite are kept as they are."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        with replacing(path) as partial:
            save_file(tensors, partial, metadata={VALUES: json.dumps(values)})

    def values(self, name: str) -> dict[str, Any]:
        with safe_open(self._path(name), framework="np") as content:
            return json.loads(content.metadata()[VALUES])

    def joined(self, names: Iterable[str], key: str) -> list[Any]:
        """The lists that pieces of work have at `key`, one after the other."""
        return list(chain.from_iterable(self.values(name)[key] for name in names))

    def array(self, name: str, key: str) -> np.ndarray:
        with safe_open(self._path(name), framework="np") as content:
            return content.get_tensor(key)

    def of_layer(self, name: str, key: str, place: int) -> np.ndarray:
        """[n, ...]: entry `place` of the second axis of an array [n, layers, ...]; the others are
        not read."""
        with safe_open(self._path(name), framework="np") as content:
            return content.get_slice(key)[:, place : place + 1][:, 0]

    def keys(self, name: str) -> set[str]:
        with safe_open(self._path(name), framework="np") as content:
            return set(content.keys())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
