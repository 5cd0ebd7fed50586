"""Result files: the machine, the versions, the command and the numbers of one run of a benchmark.

All of them follow benchmarks/result.schema.json, which is checked on writing and on reading.
"""

import datetime
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.suite.json_schema import problems_of
from benchmarks.suite.machine import cpu_mhz, gpu_state
from uno_ds.settings import SettingsError, to_plain
from uno_ds.training.report import environment

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "benchmarks" / "result.schema.json"


class ResultFile:
    """The result of the command that runs now. It is written to `path` after every measurement, so
    that a run that is interrupted loses nothing; without a path it is not written."""

    def __init__(
        self,
        path: Path | None,
        kind: str,
        recipe: "Recipe | None" = None,
        details: Mapping[str, Any] | None = None,
    ):
        self.path = path
        self.content = new_result(kind, None if recipe is None else plain_recipe(recipe))
        self.details.update(details or {})

    @property
    def measurements(self) -> list[dict[str, Any]]:
        return self.content["measurements"]

    @property
    def details(self) -> dict[str, Any]:
        return self.content["details"]

    @property
    def unknown(self) -> list[str]:
        return self.content["unknown"]

    def add(self, measurement: dict[str, Any]) -> None:
        self.measurements.append(measurement)
        self.save()

    def save(self) -> None:
        if self.path is not None:
            write_result(self.path, self.content)

    def finish(self) -> None:
        if self.path is not None:
            write_result(self.path, self.content, complete=True)
            print(f"written: {self.path}")


def plain_recipe(recipe: "Recipe") -> dict[str, Any]:
    """The resolved recipe without the architecture, which its base or shape implies."""
    plain = to_plain(recipe)
    plain.pop("architecture")
    return plain


def new_result(kind: str, recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An empty result of this process on this machine."""
    gpus = gpu_state()
    clocks = [dict(gpu) for gpu in gpus]
    for clock in clocks:
        clock.pop("driver", None)
    return {
        "schema": 1,
        "kind": kind,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "complete": False,
        **environment(),
        "clocks": {"cpu_mhz": cpu_mhz(), "gpus": clocks},
        "driver": gpus[0]["driver"] if gpus else None,
        "load": {"start": os.getloadavg()[0], "end": None, "threads": torch.get_num_threads()},
        "recipe": recipe,
        "details": {},
        "measurements": [],
        "unknown": [],
    }


def write_result(path: Path, result: dict[str, Any], complete: bool = False) -> None:
    """Validates the result and writes it atomically. Raises ValueError for a result that the schema
    does not allow."""
    result["complete"] = complete
    result["load"] = {**result["load"], "end": os.getloadavg()[0]}
    problems = validate(result)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems[:3])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(as_text(result), encoding="utf-8")
    partial.replace(path)


def as_text(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=1, allow_nan=False) + "\n"


def read_result(path: Path) -> dict[str, Any]:
    """Raises SettingsError, one line that names the file, if it is no result file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(str(path), f"is not readable JSON: {error}") from None
    problems = validate(result)
    if problems:
        message = f"is not a result file of {SCHEMA.name}: {'; '.join(problems[:3])}"
        raise SettingsError(str(path), message)
    return result


def validate(result: Any) -> list[str]:
    """Sentences about what breaks the schema of result files."""
    return problems_of(result, json.loads(SCHEMA.read_text(encoding="utf-8")), "result")


def command_line(words: list[str]) -> str:
    """The command without this machine's folders."""
    program, *arguments = map(shown_path, words)
    if program == "benchmarks/__main__.py":
        program = "-m benchmarks"
    return " ".join(["python", program, *arguments])


def shown_path(word: str) -> str:
    """Without the folders of this machine: below the project, or the name alone."""
    path = Path(word)
    if not path.is_absolute():
        return word
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
