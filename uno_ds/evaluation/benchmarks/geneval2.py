"""GenEval2: Soft-TIFA from the probability of a judge's first token."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from uno_ds.evaluation.benchmark import Picture
from uno_ds.evaluation.items import Item, check_keys, read_json_lines, text_of
from uno_ds.evaluation.judge import Question, Reply
from uno_ds.evaluation.judged import JudgedBenchmark, JudgeTexts, Values
from uno_ds.evaluation.table import Row
from uno_ds.files_on_disk import replace_text
from uno_ds.settings import SettingsError

# Our own wording of the request for one word.
ONE_WORD = "Answer with one word."
NUMBERS = {
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
PATHS = "image_filepaths.json"
# A geometric mean of probabilities that are 0 is 0 whatever the others are.
SMALLEST = 1e-12


class GenEval2(JudgedBenchmark):
    """Per prompt: mean (AM) and geometric mean (GM) of the probabilities of the right answers."""

    name: ClassVar[str] = "geneval2"
    title: ClassVar[str] = "GenEval2"
    fetch: ClassVar[str] = (
        "fetch geneval2_data.jsonl from github.com/facebookresearch/GenEval2 (CC BY-NC 4.0)."
    )

    def items(self, data: Path, variant: str) -> list[Item]:
        found: list[Item] = []
        for number, row in read_json_lines(data):
            where = f"{data}, line {number}"
            prompt = text_of(row, "prompt", where)
            pairs: Any = row.get("vqa_list")
            skills = row.get("skills")
            if not _is_list_of_pairs(pairs):
                message = f"{where}: 'vqa_list' must be a list of [question, answer]."
                raise SettingsError("--data", message)
            if not isinstance(skills, list) or len(skills) != len(pairs):
                message = f"{where}: 'skills' must name a skill for each question."
                raise SettingsError("--data", message)
            facts = {"pairs": pairs, "skills": [str(skill) for skill in skills]}
            atoms = row.get("atom_count", len(pairs))
            found.append(Item(f"{len(found):05d}", prompt, f"{atoms} atoms", facts))
        return check_keys(found, data)

    def scored_path(self, item: Item, number: int, variant: str) -> str:
        return f"{item.key}.png"

    def finish_all(self, items: Sequence[Item], folder: Path, variant: str) -> None:
        """The JSON object of prompts and image paths that the official script reads."""
        paths = {}
        for item in items:
            path = folder / self.drawn_path(item, 0, variant)
            if path.is_file():
                paths[item.prompt] = str(path.resolve())
        replace_text(folder / PATHS, json.dumps(paths, indent=1) + "\n")

    def questions(
        self, item: Item, image: Path, texts: JudgeTexts | None, variant: str, number: int
    ) -> list[Question]:
        found = []
        for place, (question, answer) in enumerate(item.facts["pairs"]):
            parts = (Picture(image), f"{question} {ONE_WORD}")
            reader = _Probability(answer)
            found.append(Question(str(place), parts, reader, max_tokens=1, logprobs=True))
        return found

    def row(self, item: Item, images: Sequence[Values]) -> Row:
        row = Row(item.key, prompt=item.prompt, group=item.group)
        skills = item.facts["skills"]
        for image in images:
            chances = [image[str(place)] for place in range(len(skills))]
            mean, geometric = soft_tifa(chances)
            row.add("AM", 100 * mean)
            row.add("GM", 100 * geometric)
            row.add(f"GM, {item.group}", 100 * geometric)
            for skill, chance in zip(skills, chances, strict=True):
                row.add(f"AM, {skill}", 100 * chance)
        return row

    def headlines(self, rows: Sequence[Row]) -> dict[str, list[str]]:
        return {"AM": ["AM"], "GM": ["GM"]}


def soft_tifa(chances: Sequence[float]) -> tuple[float, float]:
    """(mean, geometric mean) of the probabilities of a prompt's right answers."""
    logarithms = [math.log(max(chance, SMALLEST)) for chance in chances]
    return sum(chances) / len(chances), math.exp(sum(logarithms) / len(logarithms))


def spellings(answer: str) -> set[str]:
    """First tokens that count as this answer."""
    word = answer.strip()
    forms = {word.lower(), word.capitalize()}
    if word.lower() in NUMBERS:
        forms.add(NUMBERS[word.lower()])
    return forms | {f" {form}" for form in forms}


class _Probability:
    """Reads the joint probability of an answer's spellings."""

    def __init__(self, answer: str):
        self.tokens = spellings(answer)

    def __call__(self, reply: Reply) -> float:
        return min(1.0, sum(reply.tokens.get(token, 0.0) for token in self.tokens))


def _is_list_of_pairs(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_pair(pair) for pair in value)


def _is_pair(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(isinstance(text, str) and text.strip() for text in value)
