"""Result files: what a scorer found for the images of a folder."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uno_ds.evaluation.folder import FORMAT
from uno_ds.evaluation.table import Estimate, Row, Table
from uno_ds.files_on_disk import read_regular, replace_text
from uno_ds.json_text import read_json
from uno_ds.settings import SettingsError

SCORES = "scores"
# Of a scorer: where it and its files lie, which does not decide its scores.
PLACES = ("endpoint", "prompts", "detector", "clip", "references")


@dataclass
class Result:
    """Scores of one folder by one scorer. `scorer`: its name and what decides its answers.
    `record`: evaluation.json of the folder, if there is one. `failures`: {cause: number} of what
    could not be scored; `extra`: values that no prompt has, as FID."""

    benchmark: str
    variant: str
    scorer: dict[str, Any]
    rows: list[Row]
    headlines: dict[str, list[str]]
    record: dict[str, Any] | None = None
    failures: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def table(self) -> Table:
        return Table(self.rows, self.headlines)

    @property
    def label(self) -> str:
        """The checkpoint's name."""
        checkpoint = (self.record or {}).get("checkpoint", {})
        return str(checkpoint.get("label") or self.folder.name)

    @property
    def scorer_identity(self) -> str:
        """Equal for results whose scores can be compared: of one judge with the same prompts and
        options, or of the same local models."""
        decisive = {name: value for name, value in self.scorer.items() if name not in PLACES}
        return json.dumps(decisive, sort_keys=True)

    def plain(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "benchmark": self.benchmark,
            "variant": self.variant,
            "scorer": self.scorer,
            "estimates": {name: found.plain() for name, found in self.estimates().items()},
            "extra": self.extra,
            "counts": self.counts,
            "failures": self.failures,
            "generation": self.record,
            "headlines": self.headlines,
            "rows": [row.plain() for row in self.rows],
        }

    def estimates(self) -> dict[str, Estimate]:
        found = self.table.estimates() if self.rows else {}
        return found | {name: Estimate(value) for name, value in self.extra.items()}

    def write(self) -> Path:
        """Writes scores/SCORER.json into the folder."""
        path = self.folder / SCORES / f"{file_name(self.scorer['name'])}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(self.plain(), indent=1) + "\n", synced=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise SettingsError("--images", f"{path} cannot be written: {reason}.") from None
        return path


def file_name(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.+-]+", "_", name).strip(".") or "_"


def read_result(path: Path) -> Result:
    """Raises SettingsError if it is no result file."""
    try:
        plain = read_json(read_regular(path))
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            raise ValueError("it is of another format")
        rows = [_row(row) for row in plain["rows"]]
        return Result(
            benchmark=str(plain["benchmark"]),
            variant=str(plain["variant"]),
            scorer=dict(plain["scorer"]),
            rows=rows,
            headlines={name: list(columns) for name, columns in plain["headlines"].items()},
            record=plain.get("generation"),
            failures=dict(plain["failures"]),
            counts=dict(plain["counts"]),
            extra=dict(plain["extra"]),
            folder=path.parent.parent,
        )
    except OSError as error:
        raise SettingsError(str(path), f"cannot be read: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(str(path), f"is not a result of evaluate.py: {error!r}.") from None


def find_results(folders: Sequence[Path]) -> list[Result]:
    """All results in the folders and below them, in the order given. Raises SettingsError if a
    folder holds none."""
    found: dict[Path, Result] = {}
    for folder in folders:
        paths = sorted(folder.rglob(f"{SCORES}/*.json")) if folder.is_dir() else []
        paths = [path for path in paths if not path.name.startswith(".")]
        if not paths:
            message = f"{folder} holds no result; run 'evaluate.py score' first."
            raise SettingsError("DIR", message)
        for path in paths:
            found.setdefault(path.resolve(), read_result(path))
    return list(found.values())


def names_of(results: Sequence[Result]) -> list[str]:
    """Names of checkpoints; with their folders where several results of a judge have one name."""
    seen = Counter((result.label, result.scorer["name"]) for result in results)
    return [
        f"{result.label} ({result.folder})"
        if seen[result.label, result.scorer["name"]] > 1
        else result.label
        for result in results
    ]


def shown(estimate: Estimate) -> str:
    """A value with its interval, for a table."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _row(plain: Mapping[str, Any]) -> Row:
    values = {str(name): (float(pair[0]), float(pair[1])) for name, pair in plain["values"].items()}
    return Row(
        key=str(plain["key"]),
        values=values,
        stratum=str(plain["stratum"]),
        prompt=str(plain["prompt"]),
        group=str(plain["group"]),
        images=[str(image) for image in plain["images"]],
    )
