"""Scores the images of a folder: which there are, and by which scorer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from uno_ds.evaluation.benchmark import Benchmark, open_image
from uno_ds.evaluation.benchmarks.scenes import Scenes
from uno_ds.evaluation.folder import read_record
from uno_ds.evaluation.items import Item, digest_of
from uno_ds.evaluation.results import Result
from uno_ds.evaluation.table import Row
from uno_ds.settings import SettingsError


@dataclass(frozen=True)
class Scored:
    """The images that are scored. `root`: their folder, with the names that the benchmark's own
    scorer reads; `folder`: where answers and scores go."""

    benchmark: Benchmark
    variant: str
    items: list[Item]
    root: Path
    folder: Path
    data: Path | None
    record: dict[str, Any] | None

    def path(self, item: Item, number: int) -> Path:
        return self.root / self.benchmark.scored_path(item, number, self.variant)

    def present(self, item: Item) -> list[tuple[int, Path]]:
        """(number, file) of the images of a prompt that are there."""
        paths = [
            (number, self.path(item, number)) for number in range(self.benchmark.images_per_prompt)
        ]
        return [(number, path) for number, path in paths if path.is_file()]

    def shown(self, paths: Sequence[Path]) -> list[str]:
        """Names of images for a result, below its folder where they lie there."""
        return [
            str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)
            for path in dict.fromkeys(paths)
        ]


def items_of(
    benchmark: Benchmark, data: Path | None, variant: str, limit: int | None
) -> list[Item]:
    """The prompts of a benchmark, or the first of them. Raises SettingsError if the file is
    missing, or given although there is none."""
    if isinstance(benchmark, Scenes):
        if data is not None:
            raise SettingsError("--data", "does not go with scenes: the program has its prompts.")
        return benchmark.first_items(limit) if limit else benchmark.items(Path(), variant)
    if data is None:
        message = f"is required for {benchmark.name}; {benchmark.fetch}"
        raise SettingsError("--data", message)
    if not data.exists():
        raise benchmark.missing(data)
    items = benchmark.items(data, variant)
    return items[:limit] if limit else items


def open_scored(
    benchmark: Benchmark, images: Path, data: Path | None, variant: str, allow_missing: bool
) -> Scored:
    """Finds the images of the prompts. Raises SettingsError if some are missing, unless that is
    allowed, or the folder belongs to another benchmark."""
    if not images.is_dir():
        raise SettingsError("--images", f"{images} is not a folder.")
    record = read_record(images)
    limit = None
    if record is not None:
        for key, given in (("benchmark", benchmark.name), ("variant", variant)):
            if record[key] != given:
                message = f"{images} holds images of {key} '{record[key]}', not '{given}'."
                raise SettingsError("--images", message)
        limit = record["data"]["prompts"]
        recorded = record["data"]["path"]
        data = data or (Path(recorded) if recorded else None)
        if data is not None and data.exists() and digest_of(data) != record["data"]["sha256"]:
            message = f"{data} is not what the images of {images} were drawn from."
            raise SettingsError("--data", message)
    items = items_of(benchmark, data, variant, limit)
    root = images / "images" if record is not None else images
    folder = images if record is not None else images.parent / f"{images.name}-evaluation"
    scored = Scored(benchmark, variant, items, root, folder, data, record)
    _check_missing(scored, allow_missing)
    return scored


def score_by_program(scored: Scored) -> Result:
    """Scores scenes."""
    benchmark = scored.benchmark
    assert isinstance(benchmark, Scenes), "the only benchmark that a program scores"
    rows: list[Row] = []
    for item in tqdm(scored.items, desc="images", leave=False, disable=None):
        present = scored.present(item)
        if not present:
            continue
        _, path = present[0]
        row = benchmark.row(item, open_image(path, "--images"))
        row.images = scored.shown([path])
        rows.append(row)
    return result_of(scored, {"name": "program", "kind": "program"}, rows)


def result_of(scored: Scored, scorer: dict[str, Any], rows: list[Row], **more: Any) -> Result:
    """The result of scored rows, with what is known of the folder."""
    return Result(
        benchmark=scored.benchmark.name,
        variant=scored.variant,
        scorer=scorer,
        rows=rows,
        headlines=scored.benchmark.headlines(rows),
        record=scored.record,
        folder=scored.folder,
        **more,
    )


def _check_missing(scored: Scored, allow_missing: bool) -> None:
    missing, total = [], 0
    for item in scored.items:
        for number in range(scored.benchmark.images_per_prompt):
            path = scored.path(item, number)
            total += 1
            if not path.is_file():
                missing.append(path)
    if len(missing) == total:
        message = f"{scored.root} holds none of the {total} images; the first is {missing[0]}."
        raise SettingsError("--images", message)
    if missing and not allow_missing:
        raise SettingsError(
            "--images",
            f"{len(missing)} of {total} images are missing, {missing[0]} for one; draw them with "
            "'evaluate.py generate', or score the others with --allow-missing.",
        )
