"""Benchmarks that a judge scores: what it is asked, and texts of judges in a benchmark's own files.

No judge prompt is part of this project: their licences differ. They are read from the files of the
benchmark, without running them."""

import ast
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar

from uno_ds.evaluation.benchmark import JUDGE, Benchmark
from uno_ds.evaluation.items import Item, read_json_file, read_text
from uno_ds.evaluation.judge import Question
from uno_ds.evaluation.table import Row
from uno_ds.settings import SettingsError, printable

FLAG = "--judge-prompts"

# Values of an image by the name of the question.
Values = Mapping[str, Any]


@dataclass(frozen=True)
class JudgeTexts:
    """Texts of a judge by their name in the file, and dictionaries of texts. An f-string is kept as
    a template of the names in it."""

    path: Path
    texts: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    templates: Sequence[str] = ()

    def text(self, name: str) -> str:
        """Raises SettingsError if the file has no such text."""
        if name not in self.texts:
            message = f"{self.path} has no text '{printable(name)}'; is it the benchmark's file?"
            raise SettingsError(FLAG, message)
        return self.texts[name]


class JudgedBenchmark(Benchmark):
    """`prompt_files`: where the file of judge prompts may lie, seen from the folder of the data
    (`{variant}` is filled in); none: the benchmark needs no such file. `prompts_from`: what to
    fetch from where, for the message if it is missing."""

    scored_by: ClassVar[str] = JUDGE
    prompt_files: ClassVar[tuple[str, ...]] = ()
    prompts_from: ClassVar[str] = ""

    @abstractmethod
    def questions(
        self, item: Item, image: Path, texts: JudgeTexts | None, variant: str, number: int
    ) -> list[Question]:
        """What is asked about image `number` of a prompt. The keys of the questions are names
        within the image."""

    @abstractmethod
    def row(self, item: Item, images: Sequence[Values]) -> Row:
        """Scores of a prompt from the values of those of its images that have all answers."""

    def judge_texts(self, given: Path | None, data: Path | None, variant: str) -> JudgeTexts | None:
        """The texts of the file that is given, or lies where the benchmark has it. Raises
        SettingsError."""
        if not self.prompt_files:
            if given is not None:
                raise SettingsError(FLAG, f"does not go with {self.name}, which has no such file.")
            return None
        if given is not None:
            return read_judge_texts(given)
        folder = data if data is not None and data.is_dir() else (data or Path()).parent
        for name in self.prompt_files:
            path = folder / name.format(variant=variant.partition("_")[0])
            if path.is_file():
                return read_judge_texts(path)
        raise SettingsError(FLAG, f"is required for {self.name}; {self.prompts_from}")


def read_judge_texts(path: Path) -> JudgeTexts:
    """Texts in a JSON object or among the assignments of a Python file, which is parsed and never
    run. Raises SettingsError."""
    if not path.is_file():
        raise SettingsError(FLAG, f"{path} is not a file.")
    if path.suffix == ".json":
        plain = read_json_file(path, FLAG)
        if not isinstance(plain, dict):
            raise SettingsError(FLAG, f"{path} must hold a JSON object of texts.")
        return JudgeTexts(path, {key: text for key, text in plain.items() if isinstance(text, str)})
    texts: dict[str, str] = {}
    tables: dict[str, dict[str, str]] = {}
    templates: list[str] = []
    for name, value in _assignments(_parsed(path)):
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            texts.setdefault(name, value.value)
        elif isinstance(value, ast.JoinedStr):
            template = _template(value)
            templates += [template] if template is not None else []
        elif isinstance(value, ast.Dict):
            tables.setdefault(name, _table(value))
    return JudgeTexts(path, texts, tables, templates)


def fill(template: str, where: Path, **values: str) -> str:
    """A `{name}` template with the values put in: no attributes, indices or conversions. Raises
    SettingsError for another name."""
    pieces = []
    try:
        for literal, name, specification, conversion in Formatter().parse(template):
            pieces.append(literal)
            if name is None:
                continue
            if specification or conversion or name not in values:
                raise ValueError(f"the field '{printable(name, 60)}' is not known")
            pieces.append(values[name])
    except ValueError as error:
        raise SettingsError(FLAG, f"{where}: a judge prompt cannot be filled: {error}.") from None
    return "".join(pieces)


def fields_of(template: str) -> set[str]:
    """Names in a template."""
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def yes_or_no(text: str) -> bool:
    """Raises ValueError if an answer begins with neither."""
    found = re.match(r"\W*(yes|no)\b", text.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError("neither yes nor no")
    return found[1].lower() == "yes"


def json_objects(text: str) -> Iterator[str]:
    """Pieces of an answer that look like a JSON object without another one in it."""
    return (found[0] for found in re.finditer(r"\{[^{}]*\}", text, re.DOTALL))


def _parsed(path: Path) -> list[ast.AST]:
    """The syntax trees of a Python file; of one with an error in it, those of its functions and
    other top-level blocks that have none. Raises SettingsError if no block has an assignment."""
    source = read_text(path, FLAG)
    try:
        return [ast.parse(source)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        first = error
    # Published scripts lack a comma in a function that has nothing to do with their texts.
    trees: list[ast.AST] = []
    for block in re.split(r"\n(?=\S)", source):
        try:
            trees.append(ast.parse(block))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    if next(_assignments(trees), None) is None:
        raise SettingsError(FLAG, f"{path} is not a Python file: {first}.")
    return trees


def _assignments(trees: Sequence[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    for node in chain.from_iterable(map(ast.walk, trees)):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Name):
                yield target.id, node.value


def _template(value: ast.JoinedStr) -> str | None:
    """None where something other than a name is put in."""
    pieces = []
    for part in value.values:
        if isinstance(part, ast.Constant):
            pieces.append(str(part.value).replace("{", "{{").replace("}", "}}"))
        elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
            pieces.append("{" + part.value.id + "}")
        else:
            return None
    return "".join(pieces)


def _table(value: ast.Dict) -> dict[str, str]:
    found = {}
    for key, entry in zip(value.keys, value.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(entry, ast.Constant):
            if isinstance(entry.value, str):
                found[str(key.value)] = entry.value
    return found
