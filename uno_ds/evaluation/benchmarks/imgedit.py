"""ImgEdit-Bench (basic): three scores of each edit, averaged per type of edit."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from uno_ds.evaluation.benchmark import Picture
from uno_ds.evaluation.items import Item, check_keys, read_json_file, safe_name, text_of
from uno_ds.evaluation.judge import Question, Reply
from uno_ds.evaluation.judged import JudgedBenchmark, JudgeTexts, Values
from uno_ds.evaluation.table import Row
from uno_ds.settings import SettingsError

# BAGEL's settings for editing with ImgEdit and KRIS; the sampler's other defaults are BAGEL's too.
BAGEL_EDITS: Mapping[str, Any] = {
    "steps": 49,
    "text_guidance": 4.0,
    "image_guidance": 2.0,
    "guidance_interval": [0.0, 1.0],
    "renormalise": "text-channel",
}
SCORE_LINE = re.compile(r"^[\s*_-]*[^:\n]{1,80}:[\s*_]*([1-5])[\s*_.]*$", re.MULTILINE)
SCORES = 3


class ImgEdit(JudgedBenchmark):
    """The mean of three scores from 1 to 5 per image, of images per type, and of types."""

    name: ClassVar[str] = "imgedit"
    title: ClassVar[str] = "ImgEdit-Bench"
    is_edit: ClassVar[bool] = True
    sampler: ClassVar[Mapping[str, Any]] = BAGEL_EDITS
    fetch: ClassVar[str] = (
        "fetch Benchmark/Basic/basic_edit.json and its images (the folder 'singleturn') from "
        "github.com/PKU-YuanGroup/ImgEdit and its data set on huggingface.co."
    )
    prompt_files: ClassVar[tuple[str, ...]] = ("prompts.json", "Basic/prompts.json")
    prompts_from: ClassVar[str] = (
        "fetch prompts.json of Benchmark/Basic from github.com/PKU-YuanGroup/ImgEdit."
    )

    def items(self, data: Path, variant: str) -> list[Item]:
        path = data / "basic_edit.json" if data.is_dir() else data
        if not path.is_file():
            raise self.missing(path)
        plain = read_json_file(path)
        if not isinstance(plain, dict):
            raise SettingsError("--data", f"{path} must hold a JSON object of edits.")
        found = []
        for key, row in plain.items():
            where = f"{path}, {key}"
            if not isinstance(row, dict):
                raise SettingsError("--data", f"{where}: must be an object.")
            prompt, kind = text_of(row, "prompt", where), text_of(row, "edit_type", where)
            source = _source(path.parent, text_of(row, "id", where), where)
            found.append(Item(safe_name(key, where), prompt, kind, {}, (source,)))
        return check_keys(found, path)

    def scored_path(self, item: Item, number: int, variant: str) -> str:
        return f"{item.key}.png"

    def questions(
        self, item: Item, image: Path, texts: JudgeTexts | None, variant: str, number: int
    ) -> list[Question]:
        assert texts is not None, "judge_texts raises where there is none"
        text = texts.text(item.group).replace("<edit_prompt>", item.prompt)
        parts = (text, Picture(item.sources[0]), Picture(image))
        return [Question("scores", parts, three_scores)]

    def row(self, item: Item, images: Sequence[Values]) -> Row:
        row = Row(item.key, stratum=item.group, prompt=item.prompt, group=item.group)
        for image in images:
            row.add(item.group, sum(image["scores"]) / len(image["scores"]))
        return row

    def headlines(self, rows: Sequence[Row]) -> dict[str, list[str]]:
        return {"overall": sorted({row.group for row in rows})}


def three_scores(reply: Reply) -> list[int]:
    """The scores of an answer with a line "NAME: SCORE" for each. Raises ValueError."""
    scores = [int(found) for found in SCORE_LINE.findall(reply.text)]
    if len(scores) != SCORES:
        raise ValueError(f"not {SCORES} lines with a score from 1 to 5")
    return scores


def _source(folder: Path, name: str, where: str) -> Path:
    """The image below the folder of the prompts, or below its `singleturn`. Raises
    SettingsError."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise SettingsError("--data", f"{where}: '{name}' leaves the folder of the images.")
    candidates = [folder / name, folder / "singleturn" / name]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        message = f"{where}: the image {candidates[0]} does not exist; {ImgEdit.fetch}"
        raise SettingsError("--data", message)
    return found
