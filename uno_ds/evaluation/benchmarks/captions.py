"""PartiPrompts and COCO captions: how well pictures fit their texts by CLIP, and FID."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from uno_ds.evaluation.benchmark import LOCAL, Benchmark
from uno_ds.evaluation.items import Item, check_keys, read_json_file, read_table, read_text
from uno_ds.evaluation.table import Row
from uno_ds.settings import SettingsError

CLIP = "CLIP score"


class CaptionBenchmark(Benchmark):
    """The CLIP score of each picture and its text: 100 times their cosine, at least 0."""

    scored_by: ClassVar[str] = LOCAL

    def scored_path(self, item: Item, number: int, variant: str) -> str:
        return f"{item.key}.png"

    def row(self, item: Item, score: float) -> Row:
        row = Row(item.key, prompt=item.prompt, group=item.group)
        row.add(CLIP, score)
        if item.group:
            row.add(item.group, score)
        return row

    def headlines(self, rows: Sequence[Row]) -> dict[str, list[str]]:
        return {CLIP: [CLIP]}


class Parti(CaptionBenchmark):
    """PartiPrompts, by category."""

    name: ClassVar[str] = "parti"
    title: ClassVar[str] = "PartiPrompts"
    fetch: ClassVar[str] = (
        "fetch PartiPrompts.tsv from github.com/google-research/parti (Apache-2.0)."
    )

    def items(self, data: Path, variant: str) -> list[Item]:
        found: list[Item] = []
        for row in read_table(data, "\t", ("Prompt", "Category", "Challenge")):
            facts = {"challenge": row["Challenge"]}
            prompt = row["Prompt"].strip()
            found.append(Item(f"{len(found):05d}", prompt, row["Category"].strip(), facts))
        return check_keys(found, data)


class Coco(CaptionBenchmark):
    """A list of captions: COCO's annotations in JSON, of which each image's first caption is taken,
    or a text file with one on each line."""

    name: ClassVar[str] = "coco"
    title: ClassVar[str] = "COCO"
    fetch: ClassVar[str] = (
        "give annotations/captions_val2014.json of cocodataset.org, or a text file with a caption "
        "on each line."
    )

    def items(self, data: Path, variant: str) -> list[Item]:
        if data.suffix == ".json":
            return check_keys(_annotated(data), data)
        lines = [line.strip() for line in read_text(data).split("\n") if line.strip()]
        return check_keys([Item(f"{place:05d}", line) for place, line in enumerate(lines)], data)


def _annotated(data: Path) -> list[Item]:
    plain = read_json_file(data)
    first: dict[int, str] = {}
    try:
        for entry in plain["annotations"]:
            first.setdefault(_image_id(entry), str(entry["caption"]).strip())
    except (KeyError, TypeError, ValueError):
        message = f"{data} must hold 'annotations' with 'image_id' and 'caption'."
        raise SettingsError("--data", message) from None
    return [Item(f"{image:012d}", caption) for image, caption in sorted(first.items())]


def _image_id(entry: Any) -> int:
    return int(entry["image_id"])
