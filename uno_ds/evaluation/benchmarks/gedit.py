"""GEdit-Bench: semantic consistency and perceptual quality of edits, in eleven groups."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from uno_ds.data.images import BadRow, ImageSettings, decode
from uno_ds.evaluation.benchmark import Picture
from uno_ds.evaluation.items import Item, check_keys, safe_name
from uno_ds.evaluation.judge import Question, Reply
from uno_ds.evaluation.judged import JudgedBenchmark, JudgeTexts, Values
from uno_ds.evaluation.table import Row
from uno_ds.files_on_disk import replacing
from uno_ds.settings import SettingsError, printable

TEXTS = ("task_type", "key", "instruction", "instruction_language")
IMAGES = ("input_image_raw", "input_image")
# Not by a JSON parser: judges forget to escape quotes in the reasoning beside the scores.
SCORE_LIST = re.compile(r"""score["']?\s*:\s*\[([^\[\]]*)\]""", re.IGNORECASE)


class GEdit(JudgedBenchmark):
    """Per image: SC, the smaller of two scores from 0 to 10 of the edit; PQ, the smaller of two of
    its quality; and O, the root of SC times PQ. Each is averaged per group, then over groups."""

    name: ClassVar[str] = "gedit"
    title: ClassVar[str] = "GEdit-Bench"
    is_edit: ClassVar[bool] = True
    variants: ClassVar[tuple[str, ...]] = ("en", "cn")
    sampler: ClassVar[Mapping[str, Any]] = {
        "steps": 49,
        "text_guidance": 4.0,
        "image_guidance": 1.5,
        "guidance_interval": [0.4, 1.0],
        "renormalise": "global",
    }
    fetch: ClassVar[str] = (
        "fetch the parquet files of the data set stepfun-ai/GEdit-Bench from huggingface.co (MIT)."
    )
    prompt_files: ClassVar[tuple[str, ...]] = (
        "vie_prompts.py",
        "viescore/vie_prompts.py",
        "../viescore/vie_prompts.py",
        "GEdit-Bench/viescore/vie_prompts.py",
    )
    prompts_from: ClassVar[str] = (
        "fetch GEdit-Bench/viescore/vie_prompts.py from github.com/stepfun-ai/Step1X-Edit "
        "(Apache-2.0)."
    )

    def items(self, data: Path, variant: str) -> list[Item]:
        found = []
        for path in _parquet_files(data):
            for number, row in enumerate(_text_columns(path)):
                where = f"{path}, row {number}"
                if row["instruction_language"] != variant:
                    continue
                key = safe_name(str(row["key"]), where)
                group = safe_name(str(row["task_type"]), where)
                facts = {"file": path, "row": number}
                found.append(Item(key, str(row["instruction"]), group, facts))
        return check_keys(found, data)

    def scored_path(self, item: Item, number: int, variant: str) -> str:
        return f"fullset/{item.group}/{variant}/{item.key}.png"

    def source_path(self, item: Item, variant: str) -> str:
        """The official scorer reads the source image beside the edited one."""
        return f"fullset/{item.group}/{variant}/{item.key}_SRCIMG.png"

    def source_images(self, item: Item) -> list[Image.Image]:
        content = _image_of_row(item.facts["file"], item.facts["row"])
        try:
            return [decode(content, ImageSettings())]
        except BadRow as error:
            where = f"{item.facts['file']}, row {item.facts['row']}"
            raise SettingsError("--data", f"{where}: the image is not usable: {error}.") from None

    def finish(self, items: Sequence[Item], folder: Path, variant: str) -> None:
        for item in items:
            path = folder / "images" / self.source_path(item, variant)
            edited = folder / self.drawn_path(item, 0, variant)
            if path.is_file() or not edited.is_file():
                continue
            image = self.source_images(item)[0]
            with replacing(path) as partial:
                image.save(partial, format="PNG")

    def questions(
        self, item: Item, image: Path, texts: JudgeTexts | None, variant: str, number: int
    ) -> list[Question]:
        assert texts is not None, "judge_texts raises where there is none"
        source = image.with_name(f"{item.key}_SRCIMG.png")
        if not source.is_file():
            raise SettingsError("--images", f"{source}, the source of an edit, is missing.")
        context = texts.text("_context_no_delimit")
        rule = texts.text("_prompts_0shot_two_image_edit_rule")
        success = texts.text("_prompts_0shot_tie_rule_SC")
        consistency = "\n".join([context, rule, success]).replace("<instruction>", item.prompt)
        quality = "\n".join([context, texts.text("_prompts_0shot_rule_PQ")])
        return [
            Question("SC", (consistency, Picture(source), Picture(image)), two_scores),
            Question("PQ", (quality, Picture(image)), two_scores),
        ]

    def row(self, item: Item, images: Sequence[Values]) -> Row:
        row = Row(item.key, stratum=item.group, prompt=item.prompt, group=item.group)
        for image in images:
            consistency, quality = min(image["SC"]), min(image["PQ"])
            row.add(f"SC, {item.group}", consistency)
            row.add(f"PQ, {item.group}", quality)
            row.add(item.group, math.sqrt(consistency * quality))
        return row

    def headlines(self, rows: Sequence[Row]) -> dict[str, list[str]]:
        groups = sorted({row.group for row in rows})
        return {
            "overall": groups,
            "SC": [f"SC, {group}" for group in groups],
            "PQ": [f"PQ, {group}" for group in groups],
        }


def two_scores(reply: Reply) -> list[float]:
    """The `score` list of an answer: two numbers from 0 to 10. Raises ValueError."""
    for listed in SCORE_LIST.findall(reply.text):
        try:
            scores = [float(score) for score in listed.split(",")]
        except ValueError:
            continue
        if len(scores) == 2 and all(0 <= score <= 10 for score in scores):
            return scores
    raise ValueError("no two scores from 0 to 10")


def _parquet_files(data: Path) -> list[Path]:
    paths = sorted(data.rglob("*.parquet")) if data.is_dir() else [data]
    if not paths:
        raise SettingsError("--data", f"{data} holds no parquet file; {GEdit.fetch}")
    return paths


def _text_columns(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path, columns=list(TEXTS)).to_pylist()
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        message = f"{path} is not a file of GEdit-Bench: {printable(error, 200).rstrip('.')}."
        raise SettingsError("--data", message) from None


def _image_of_row(path: Path, number: int) -> bytes:
    """The encoded source image of a row: the raw one where there is one."""
    file = pq.ParquetFile(path)
    names = [name for name in IMAGES if name in file.schema_arrow.names]
    if not names:
        raise SettingsError("--data", f"{path} has no column {' or '.join(IMAGES)}.")
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if number < first + rows:
            value = _column(path, group, names[0])[number - first].as_py()
            content = value.get("bytes") if isinstance(value, dict) else value
            return content if isinstance(content, bytes) else b""
        first += rows
    raise AssertionError(f"{path} has fewer rows than it had")


@functools.lru_cache(maxsize=1)
def _column(path: Path, group: int, name: str) -> pa.ChunkedArray:
    """One column of a row group; the last one is kept, since rows are read in their order."""
    return pq.ParquetFile(path).read_row_group(group, columns=[name]).column(0)
