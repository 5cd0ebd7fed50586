"""Where a generation goes wrong: the picture is judged, the understanding expert says what it sees,
and both are compared with the prompt.

Two judgements of each picture make four cells. Drawn right: the picture shows what the prompt asks
for, by verdicts that are given, by a judge model, or by program for scenes. Read right: the
understanding expert agrees with that judgement, that is, it reads what was asked for where it was
drawn and something else where it was not. Drawn wrong and read right is a generation error that
supervision by understanding can mend; drawn wrong and read wrong is one that it cannot see."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uno_ds.data.scene_reading import score_text
from uno_ds.data.scene_score import score
from uno_ds.files_on_disk import read_regular
from uno_ds.generation.inference import CaptionSettings, SampleSettings, caption, generate
from uno_ds.inspection.subject import Subject
from uno_ds.settings import SettingsError

CELLS = (
    ("drawn right", "read right"),
    ("drawn right", "read wrong"),
    ("drawn wrong", "read right"),
    ("drawn wrong", "read wrong"),
)
LARGEST_FILE = 100_000_000
_KEYS = ("prompt", "scene", "questions", "drawn_right")


@dataclass(frozen=True)
class Prompt:
    """scene: its ground truth, if it is one of the embedded set; questions: (question, the answer
    that a right picture has); drawn_right: a judge's verdict on the picture of each checkpoint, by
    its name."""

    text: str
    scene: Any = None
    questions: tuple[tuple[str, str], ...] = ()
    drawn_right: tuple[tuple[str, bool], ...] = ()

    def verdict(self, name: str) -> bool | None:
        return dict(self.drawn_right).get(name)


@dataclass(frozen=True)
class Verdict:
    """A judge model's. drawn: whether the picture shows what was asked for; read: whether the
    caption says it, where neither answers nor a program tell; None: no usable answer, or not
    asked."""

    drawn: bool | None
    read: bool | None


def read_prompts(path: Path) -> list[Prompt]:
    """A prompt a line: JSON {"prompt", "scene", "questions": [[question, answer]], "drawn_right":
    {checkpoint: true}}, all but the first optional, or plain text. Raises SettingsError under
    `--prompts` that names the line."""
    try:
        lines = read_regular(path, LARGEST_FILE).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise SettingsError("--prompts", f"'{path}': {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise SettingsError("--prompts", f"'{path}' is no UTF-8 text.") from None
    prompts = [
        _parsed(line, f"'{path}', line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise SettingsError("--prompts", f"'{path}' holds no prompt.")
    return prompts


def _parsed(line: str, where: str) -> Prompt:
    if not line.lstrip().startswith("{"):
        return Prompt(line.strip())
    try:
        content = json.loads(line)
        unknown = sorted(set(content) - set(_KEYS))
        if unknown:
            raise ValueError(f"unknown key '{unknown[0]}'; allowed are {', '.join(_KEYS)}")
        if not isinstance(content.get("prompt"), str) or not content["prompt"].strip():
            raise ValueError("'prompt' must be a text")
        verdicts = content.get("drawn_right") or {}
        if not isinstance(verdicts, dict) or not all(type(v) is bool for v in verdicts.values()):
            raise ValueError("'drawn_right' must map names of checkpoints to true or false")
        questions = content.get("questions") or []
        pairs = [(str(question), str(answer)) for question, answer in questions]
        scene = content.get("scene")
        if scene is not None:
            # Refuses what the program cannot judge.
            score_text("", scene)
            score(Image.new("RGB", (32, 32)), scene)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError("--prompts", f"{where}: {error}.") from None
    return Prompt(content["prompt"], scene, tuple(pairs), tuple(verdicts.items()))


def diagnose(
    subject: Subject, prompts: Sequence[Prompt], settings: SampleSettings, most_tokens: int
) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    """(the picture of each prompt, what was drawn and read): captions, answers, and for scenes what
    the program says of picture and caption. The first picture has the seed of the settings, the
    next ones count up."""
    model, codec, tokenizer = (
        subject.objective.model,
        subject.objective.codec,
        subject.tokenizer,
    )
    pictures = generate(model, codec, tokenizer, settings)
    reading = CaptionSettings(max_tokens=most_tokens)
    texts = caption(model, codec, tokenizer, pictures, reading)
    records = []
    for prompt, picture, text in zip(prompts, pictures, texts, strict=True):
        record: dict[str, Any] = {"prompt": prompt.text, "caption": text, "answers": []}
        if prompt.scene is not None:
            record["drawn"] = score(picture, prompt.scene)
            record["read"] = score_text(text, prompt.scene)
        for question, wanted in prompt.questions:
            answer = caption(model, codec, tokenizer, [picture], reading, question)[0]
            record["answers"].append([question, wanted, answer])
        records.append(record)
    return pictures, records


def cell_of(
    record: dict[str, Any], given: bool | None, judged: Verdict | None = None
) -> tuple[str, str] | None:
    """The cell of a picture; None where nothing judges it. given: whether it was drawn right, by
    the prompts file; judged: what a judge model said, if there is one, which the program's
    judgement is used without."""
    drawn = judged.drawn if judged is not None else record.get("drawn", {}).get("all")
    if given is not None:
        drawn = given
    asked_for = _reads_what_was_asked(record)
    if judged is not None and needs_reader(record):
        asked_for = judged.read
    if drawn is None or asked_for is None:
        return None
    read_right = asked_for == drawn
    return (
        "drawn right" if drawn else "drawn wrong",
        "read right" if read_right else "read wrong",
    )


def needs_reader(record: dict[str, Any]) -> bool:
    """Whether neither answers nor a program tell what the understanding expert has read."""
    return not record["answers"] and "read" not in record


def _reads_what_was_asked(record: dict[str, Any]) -> bool | None:
    """Whether the understanding expert sees what the prompt asks for: by all its answers, where
    there are questions, else by its caption."""
    if record["answers"]:
        return all(_same(answer, wanted) for _, wanted, answer in record["answers"])
    return record["read"]["all"] if "read" in record else None


def _same(answer: str, wanted: str) -> bool:
    return answer.strip().strip(".").lower() == wanted.strip().strip(".").lower()


def table(cells: Sequence[tuple[str, str] | None]) -> dict[str, Any]:
    """{"cells": {"drawn right, read right": count, ...}, "judged", "not_judged"}."""
    counts = Counter(cell for cell in cells if cell is not None)
    return {
        "cells": {", ".join(cell): counts[cell] for cell in CELLS},
        "judged": counts.total(),
        "not_judged": len(cells) - counts.total(),
    }


def as_array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))
