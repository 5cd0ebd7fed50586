"""Scores of a folder by a judge: asks what is not answered yet, and reads all answers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from uno_ds.evaluation.answers import KeptAnswers, Outcome, ask_all
from uno_ds.evaluation.items import Item, digest_of
from uno_ds.evaluation.judge import Judge, Question
from uno_ds.evaluation.judged import JudgedBenchmark, JudgeTexts
from uno_ds.evaluation.results import Result
from uno_ds.evaluation.scoring import Scored, result_of
from uno_ds.evaluation.table import Row
from uno_ds.settings import SettingsError


def score_by_judge(scored: Scored, judge: Judge, prompts: Path | None, parallel: int) -> Result:
    """An image without all its answers is left out and counted by the cause; it is never taken as
    0. Raises SettingsError if no image has all of them."""
    benchmark = scored.benchmark
    assert isinstance(benchmark, JudgedBenchmark), "only these are scored by a judge"
    texts = benchmark.judge_texts(prompts, scored.data, scored.variant)
    total = sum(1 for _ in _questions(scored, benchmark, texts))
    answers = KeptAnswers(scored.folder, judge.model)
    try:
        with tqdm(total=total, desc=judge.model, unit="answer", disable=None) as bar:
            questions = _questions(scored, benchmark, texts)
            outcome = ask_all(judge, questions, answers, parallel, bar.update)
    finally:
        answers.close()
    rows, images, left_out = _rows(scored, benchmark, texts, outcome)
    if not rows:
        causes = ", ".join(f"{cause} {count}" for cause, count in outcome.causes.items())
        message = f"{judge.host} answered nothing that could be used ({causes})."
        raise SettingsError("--judge", message)
    scorer = judge.description()
    if texts is not None:
        scorer |= {"prompts": texts.path.name, "prompts_sha256": digest_of(texts.path)}
    counts = {
        "images": images,
        "images_left_out": sum(left_out.values()),
        "questions": total,
        "asked": outcome.asked,
        "kept": outcome.kept,
    }
    failures = {f"{cause} (images left out)": count for cause, count in left_out.items()}
    return result_of(scored, scorer, rows, counts=counts, failures=failures)


def _questions(
    scored: Scored, benchmark: JudgedBenchmark, texts: JudgeTexts | None
) -> Iterator[Question]:
    for item in scored.items:
        for number, path in scored.present(item):
            for question in benchmark.questions(item, path, texts, scored.variant, number):
                yield replace(question, key=_key(item, number, question.key))


def _rows(
    scored: Scored, benchmark: JudgedBenchmark, texts: JudgeTexts | None, outcome: Outcome
) -> tuple[list[Row], int, Counter[str]]:
    """(rows, images that count, causes of those left out)."""
    rows, images = [], 0
    left_out: Counter[str] = Counter()
    for item in scored.items:
        values, paths = [], []
        for number, path in scored.present(item):
            names = [
                question.key
                for question in benchmark.questions(item, path, texts, scored.variant, number)
            ]
            keys = [_key(item, number, name) for name in names]
            failed = [outcome.failed[key] for key in keys if key in outcome.failed]
            if failed:
                left_out[failed[0]] += 1
                continue
            pairs = zip(names, keys, strict=True)
            found: dict[str, Any] = {name: outcome.values[key] for name, key in pairs}
            values.append(found)
            paths.append(path)
        if values:
            row = benchmark.row(item, values)
            row.images = scored.shown(paths)
            rows.append(row)
            images += len(values)
    return rows, images, left_out


def _key(item: Item, number: int, name: str) -> str:
    return f"{item.key}/{number}/{name}"
