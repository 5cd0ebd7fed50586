"""KRIS-Bench: edits that need knowledge, a folder for each category."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from uno_ds.evaluation.benchmark import Picture
from uno_ds.evaluation.benchmarks.imgedit import BAGEL_EDITS
from uno_ds.evaluation.items import Item, check_keys, read_json_file, safe_name
from uno_ds.evaluation.judge import Question, Reply
from uno_ds.evaluation.judged import JudgedBenchmark, JudgeTexts, Values, fill, json_objects
from uno_ds.evaluation.table import Row
from uno_ds.settings import SettingsError, printable

CONSISTENCY, QUALITY, INSTRUCTION, KNOWLEDGE = "consistency", "quality", "instruction", "knowledge"
# Categories by the set of questions that the official scripts ask. Earlier scripts name two of them
# otherwise than the folders of the data are named: daily_life and rule_reasoning.
KNOWLEDGE_CATEGORIES = {
    "abstract_reasoning",
    "mathematics",
    "practical_knowledge",
    "daily_life",
    "medicine",
    "rule-based_reasoning",
    "rule_reasoning",
    "biology",
    "geography",
    "chemistry",
    "humanities",
    "physics",
}
SEVERAL_IMAGES, FRAMES = "multi-element_composition", "temporal_prediction"
VIEW = "view"
FRAME = re.compile(r"(\d+)-(\d+)")
MAX_TOKENS = 1000


class Kris(JudgedBenchmark):
    """Scores s from 1 to 5 become 25 (s - 1). Overall is the mean of all scores of all images."""

    name: ClassVar[str] = "kris"
    title: ClassVar[str] = "KRIS-Bench"
    is_edit: ClassVar[bool] = True
    sampler: ClassVar[Mapping[str, Any]] = BAGEL_EDITS
    fetch: ClassVar[str] = (
        "fetch the folder KRIS_Bench from github.com/mercurystraw/Kris_Bench or its data set on "
        "huggingface.co."
    )
    prompt_files: ClassVar[tuple[str, ...]] = (
        "../ReasonEdit/prompts.py",
        "../utils/prompts.py",
        "prompts.py",
    )
    prompts_from: ClassVar[str] = "fetch its prompts.py from github.com/mercurystraw/Kris_Bench."

    def items(self, data: Path, variant: str) -> list[Item]:
        found = []
        for path in sorted(data.glob("*/annotation.json")):
            plain = read_json_file(path)
            if not isinstance(plain, dict):
                raise SettingsError("--data", f"{path} must hold a JSON object of edits.")
            for key, row in plain.items():
                found.append(_item(path, key, row))
        if not found:
            message = f"{data} holds no CATEGORY/annotation.json; {self.fetch}"
            raise SettingsError("--data", message)
        return check_keys(found, data)

    def scored_path(self, item: Item, number: int, variant: str) -> str:
        return f"{item.group}/{item.facts['id']}.jpg"

    def questions(
        self, item: Item, image: Path, texts: JudgeTexts | None, variant: str, number: int
    ) -> list[Question]:
        assert texts is not None, "judge_texts raises where there is none"
        # The scripts of these two categories have another text before the picture.
        several = item.group in (SEVERAL_IMAGES, FRAMES)
        label = "This is the image to evaluate:" if several else "This is the edited image:"
        quality = _question(
            QUALITY, texts.text("prompt_quality"), (label, Picture(image)), (QUALITY,)
        )
        return [*_questions_of_category(item, image, texts), quality]

    def row(self, item: Item, images: Sequence[Values]) -> Row:
        row = Row(item.key, stratum=item.group, prompt=item.prompt, group=item.group)
        for image in images:
            scores: dict[str, float] = {}
            for part in image.values():
                scores |= part
            for name, score in scores.items():
                value = 25.0 * (score - 1)
                for column in ("overall", name, item.group):
                    row.add(column, value)
        return row

    def headlines(self, rows: Sequence[Row]) -> dict[str, list[str]]:
        return {"overall": ["overall"]}


class _Scores:
    """Reads the scores NAME_score of an answer in JSON, or in words."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    def __call__(self, reply: Reply) -> dict[str, int]:
        return {name: _score(reply.text, name) for name in self.names}


def _score(text: str, name: str) -> int:
    field = f"{name}_score"
    for piece in json_objects(text):
        try:
            score = int(json.loads(piece)[field])
        except (ValueError, KeyError, TypeError):
            continue
        if 1 <= score <= 5:
            return score
    found = re.search(rf"{name}[_\s]*score\W*([1-5])\b", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"no {field} from 1 to 5")
    return int(found[1])


def _questions_of_category(item: Item, image: Path, texts: JudgeTexts) -> list[Question]:
    """All questions but the one of quality."""
    facts = item.facts
    pair = ("This is the original image:", Picture(item.sources[0]))
    edited = ("This is the edited image:", Picture(image))
    values = {"instruct": item.prompt, "explanation": facts["explanation"]}
    names = {CONSISTENCY: "prompt_consist", INSTRUCTION: "prompt_instruction_following"}
    parts: tuple[str | Picture, ...] = (*pair, *edited)
    followed = parts
    if item.group in KNOWLEDGE_CATEGORIES:
        dual = _filled(texts, "prompt_dual_evaluation", values)
        consistency = _filled(texts, "prompt_consist", values)
        return [
            _question(CONSISTENCY, consistency, parts, (CONSISTENCY,)),
            _question(INSTRUCTION, dual, parts, (INSTRUCTION, KNOWLEDGE)),
        ]
    if item.group == SEVERAL_IMAGES:
        names = {CONSISTENCY: "prompt_consist_multi", INSTRUCTION: "prompt_instruction_multi"}
        parts = followed = _references(item, image)
    elif item.group == FRAMES:
        names = {CONSISTENCY: "prompt_consist_temporal", INSTRUCTION: "prompt_instruction_temporal"}
        number, parts = _frames(item, image)
        followed = parts
        values["N"] = str(number)
    elif VIEW in item.group and facts["truth"] is not None:
        names[INSTRUCTION] = "prompt_view_instruction_following"
        followed = (*parts, "This is the ground truth image:", Picture(facts["truth"]))
    return [
        _question(CONSISTENCY, _filled(texts, names[CONSISTENCY], values), parts, (CONSISTENCY,)),
        _question(
            INSTRUCTION, _filled(texts, names[INSTRUCTION], values), followed, (INSTRUCTION,)
        ),
    ]


def _filled(texts: JudgeTexts, name: str, values: Mapping[str, str]) -> str:
    return fill(texts.text(name), texts.path, **values)


def _question(
    name: str, text: str, parts: Sequence[str | Picture], scores: Sequence[str]
) -> Question:
    return Question(name, (text, *parts), _Scores(scores), MAX_TOKENS)


def _references(item: Item, image: Path) -> tuple[str | Picture, ...]:
    parts: list[str | Picture] = []
    for number, source in enumerate(item.sources, start=1):
        parts += [f"Reference Image {number}:", Picture(source)]
    return (*parts, "Predicted Image:", Picture(image))


def _frames(item: Item, image: Path) -> tuple[int, tuple[str | Picture, ...]]:
    """(number of the frame that is drawn, all frames in their order). Files are named ID-FRAME."""
    known: dict[int, Path] = {}
    for source in item.sources:
        found = FRAME.search(source.name)
        known[int(found[2]) if found else len(known) + 1] = source
    missing = [number for number in range(1, len(known) + 2) if number not in known]
    drawn = missing[0]
    frames = {number: ("Reference", path) for number, path in known.items()}
    frames[drawn] = ("Generated", image)
    parts: list[str | Picture] = []
    for number in sorted(frames):
        kind, path = frames[number]
        parts += [f"Frame {number} ({kind}):", Picture(path)]
    return drawn, tuple(parts)


def _item(path: Path, key: str, row: Any) -> Item:
    where = f"{path}, {printable(key)}"
    if not isinstance(row, dict):
        raise SettingsError("--data", f"{where}: must be an object.")
    prompt = row.get("ins_en") or row.get("instruction")
    if not isinstance(prompt, str) or not prompt.strip():
        raise SettingsError("--data", f"{where}: 'ins_en' must be a text.")
    names = row.get("ori_img")
    files = [names] if isinstance(names, str) else names
    if not isinstance(files, list) or not files:
        raise SettingsError("--data", f"{where}: 'ori_img' must name an image.")
    sources = tuple(_file(path.parent, name, where) for name in files)
    truth = row.get("gt_img")
    group = safe_name(path.parent.name, where)
    facts = {
        "id": safe_name(str(key), where),
        "explanation": str(row.get("explain_en") or row.get("explain") or ""),
        "truth": _file(path.parent, truth, where) if truth else None,
    }
    return Item(f"{group}/{key}", prompt, group, facts, sources)


def _file(folder: Path, name: Any, where: str) -> Path:
    path = folder / safe_name(str(name), where)
    if not path.is_file():
        raise SettingsError("--data", f"{where}: the image {path} does not exist; {Kris.fetch}")
    return path
