"""UniGenBench++: test points of ten dimensions, several in one question."""

import ast
import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from uno_ds.evaluation.benchmark import Picture
from uno_ds.evaluation.items import Item, check_keys, read_table, safe_name
from uno_ds.evaluation.judge import Question, Reply
from uno_ds.evaluation.judged import FLAG, JudgedBenchmark, JudgeTexts, Values, fields_of, fill
from uno_ds.evaluation.table import Row
from uno_ds.settings import SettingsError, printable

FIELDS = {"prompt", "testpoint", "explanation", "test_explanation"}
# What the test points of a row and their descriptions are called, by the language of the prompts.
POINT_KEYS = {"en": ("Testpoints", "Testpoint Description"), "zh": ("考点", "考点对应描述")}
SCORE = re.compile(r"<score>(.*?)</score>", re.DOTALL)


class UniGenBench(JudgedBenchmark):
    """Share of test points that hold, per dimension (the text before the first "-"); overall is the
    mean of the dimensions."""

    name: ClassVar[str] = "unigenbench"
    title: ClassVar[str] = "UniGenBench++"
    variants: ClassVar[tuple[str, ...]] = ("en", "en_long", "zh", "zh_long")
    images_per_prompt: ClassVar[int] = 4
    fetch: ClassVar[str] = (
        "fetch data/test_prompts_{en,en_long,zh,zh_long}.csv from "
        "github.com/CodeGoat24/UniGenBench (CC BY 4.0)."
    )
    prompt_files: ClassVar[tuple[str, ...]] = (
        "../eval/gemini_{variant}_eval.py",
        "eval/gemini_{variant}_eval.py",
    )
    prompts_from: ClassVar[str] = (
        "fetch eval/gemini_en_eval.py (or gemini_zh_eval.py) from github.com/CodeGoat24/UniGenBench"
        ", or the script of its own judge model."
    )

    def items(self, data: Path, variant: str) -> list[Item]:
        path = data / f"test_prompts_{variant}.csv" if data.is_dir() else data
        if not path.is_file():
            raise self.missing(path)
        language = variant.partition("_")[0]
        text, points = f"prompt_{language}", f"sub_dims_{language}"
        found = []
        for number, row in enumerate(read_table(path, ",", ("index", text, points)), start=2):
            where = f"{path}, row {number}"
            key = safe_name(row["index"].strip(), where)
            facts = _test_points(row[points], POINT_KEYS[language], where)
            found.append(Item(key, row[text].strip(), "", facts))
        return check_keys(found, path)

    def scored_path(self, item: Item, number: int, variant: str) -> str:
        return f"{item.key}_{number}.png"

    def questions(
        self, item: Item, image: Path, texts: JudgeTexts | None, variant: str, number: int
    ) -> list[Question]:
        assert texts is not None, "judge_texts raises where there is none"
        points = item.facts["points"]
        text = fill(
            _template(texts),
            texts.path,
            prompt=item.prompt,
            testpoint=str(points),
            explanation=_explanation(texts, "explanation", points, _meanings(texts, points)),
            test_explanation=_explanation(
                texts, "test_explanation", points, item.facts["descriptions"]
            ),
        )
        return [Question("points", (Picture(image), text), _Scores(len(points)), 4000)]

    def row(self, item: Item, images: Sequence[Values]) -> Row:
        row = Row(item.key, prompt=item.prompt)
        for image in images:
            for point, score in zip(item.facts["points"], image["points"], strict=True):
                row.add(dimension_of(point), 100.0 * score)
        row.group = next(iter(row.values), "")
        return row

    def headlines(self, rows: Sequence[Row]) -> dict[str, list[str]]:
        dimensions = set(chain.from_iterable(row.values for row in rows))
        return {"overall": sorted(dimensions)}


def dimension_of(point: str) -> str:
    """Attribute of "Attribute - Size", 属性 of "属性-大小"."""
    return point.split("-", 1)[0].strip()


class _Scores:
    """Reads as many scores of 0 or 1 as there are test points."""

    def __init__(self, count: int):
        self.count = count

    def __call__(self, reply: Reply) -> list[int]:
        found = SCORE.search(reply.text)
        if found is None:
            raise ValueError("no <score>")
        try:
            scores = ast.literal_eval(found[1].strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ValueError("<score> is no list") from None
        if not isinstance(scores, list) or len(scores) != self.count:
            raise ValueError(f"<score> has not {self.count} entries")
        if any(score not in (0, 1) for score in scores):
            raise ValueError("a score is neither 0 nor 1")
        return [int(score) for score in scores]


def _test_points(text: str, keys: tuple[str, str], where: str) -> dict[str, Any]:
    try:
        plain = json.loads(text)
        points, descriptions = (plain[key] for key in keys)
    except (ValueError, KeyError, TypeError):
        message = (
            f"{where}: the test points must be JSON with {' and '.join(keys)}, "
            f"got {printable(text, 80)}."
        )
        raise SettingsError("--data", message) from None
    lists = isinstance(points, list) and isinstance(descriptions, list)
    if not lists or not points or len(points) != len(descriptions):
        message = f"{where}: there must be a description for each test point."
        raise SettingsError("--data", message)
    return {"points": [str(point) for point in points], "descriptions": list(descriptions)}


def _template(texts: JudgeTexts) -> str:
    """The f-string of the script that asks for test points."""
    for template in texts.templates:
        if FIELDS <= fields_of(template):
            return template
    message = f"{texts.path} has no text with {', '.join(sorted(FIELDS))} in it."
    raise SettingsError(FLAG, message)


def _meanings(texts: JudgeTexts, points: Sequence[str]) -> list[str]:
    """What the test points mean in general, from the script's table."""
    table = next((table for table in texts.tables.values() if points[0] in table), {})
    missing = [point for point in points if point not in table]
    if missing:
        message = f"{texts.path} does not explain '{printable(missing[0])}'."
        raise SettingsError(FLAG, message)
    return [table[point] for point in points]


def _explanation(
    texts: JudgeTexts, name: str, points: Sequence[str], meanings: Sequence[object]
) -> str:
    """A list of test points as the script lays it out: its opening, a line each, its closing."""
    lines = [f"{point}: {meaning}" for point, meaning in zip(points, meanings, strict=True)]
    return "\n".join([texts.text(name), *lines, "」"])
