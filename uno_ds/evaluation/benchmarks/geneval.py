"""GenEval: objects, counts, colours and positions, found by a detector and CLIP."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from uno_ds.evaluation.benchmark import LOCAL, Benchmark
from uno_ds.evaluation.items import Item, check_keys, read_json_lines, text_of
from uno_ds.evaluation.table import Row
from uno_ds.files_on_disk import replace_text
from uno_ds.settings import SettingsError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class GenEval(Benchmark):
    """Share of images in which all objects of the prompt are found as it asks; overall is the mean
    of the six kinds of prompts. Scored by models of transformers: see geneval-transformers."""

    name: ClassVar[str] = "geneval"
    title: ClassVar[str] = "GenEval"
    scored_by: ClassVar[str] = LOCAL
    images_per_prompt: ClassVar[int] = 4
    fetch: ClassVar[str] = (
        "fetch prompts/evaluation_metadata.jsonl from github.com/djghosh13/geneval (MIT), or "
        "BAGEL's file of rewritten prompts."
    )

    def items(self, data: Path, variant: str) -> list[Item]:
        found: list[Item] = []
        for number, row in read_json_lines(data):
            where = f"{data}, line {number}"
            prompt, tag = text_of(row, "prompt", where), text_of(row, "tag", where)
            for name in ("include", "exclude"):
                _check_clauses(row.get(name, []), name, where)
            found.append(Item(f"{len(found):05d}", prompt, tag, {"metadata": row}))
        return check_keys(found, data)

    def scored_path(self, item: Item, number: int, variant: str) -> str:
        return f"{item.key}/samples/{number:05d}.png"

    def finish(self, items: Sequence[Item], folder: Path, variant: str) -> None:
        for item in items:
            path = folder / "images" / item.key / "metadata.jsonl"
            if path.parent.is_dir():
                replace_text(path, json.dumps(item.facts["metadata"]) + "\n")

    def row(self, item: Item, right: Sequence[bool]) -> Row:
        """Scores of a prompt, in percent, from whether each of its images is right."""
        row = Row(item.key, stratum=item.group, prompt=item.prompt, group=item.group)
        for value in right:
            row.add(item.group, 100.0 * value)
        return row

    def headlines(self, rows: Sequence[Row]) -> dict[str, list[str]]:
        tags = {row.group for row in rows}
        known = [tag for tag in TAGS if tag in tags]
        return {"overall": [*known, *sorted(tags - set(TAGS))]}


def _check_clauses(clauses: Any, name: str, where: str) -> None:
    is_list = isinstance(clauses, list)
    if is_list and all(_is_clause(clause, number) for number, clause in enumerate(clauses)):
        return
    message = f"{where}: '{name}' must be a list of {{class, count, color?, position?}}."
    raise SettingsError("--data", message)


def _is_clause(clause: Any, number: int) -> bool:
    if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
        return False
    if type(clause.get("count")) is not int or clause["count"] < 1:
        return False
    position = clause.get("position")
    if position is None:
        return True
    is_pair = isinstance(position, list) and len(position) == 2
    return is_pair and type(position[1]) is int and 0 <= position[1] < number
