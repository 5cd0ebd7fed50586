"""What a judge model says of a diagnosis: its pictures, and captions that no program judges."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from uno_ds.commands.score import check_judge_numbers, judge_of
from uno_ds.evaluation.answers import KeptAnswers, Outcome, ask_all
from uno_ds.evaluation.benchmark import Picture
from uno_ds.evaluation.judge import Judge, Question, Reply
from uno_ds.evaluation.judged import yes_or_no
from uno_ds.inspection.diagnosis import Verdict, needs_reader
from uno_ds.inspection.plan import Plan
from uno_ds.inspection.report import picture_path
from uno_ds.inspection.store import Store
from uno_ds.settings import SettingsError

DRAWN = "Does this picture show all that the text asks for? Answer yes or no.\nText: {prompt}"
READ = (
    "One text asks for a picture, the other one describes a picture. Does the picture that is "
    "described show all that was asked for? Answer yes or no.\nAsked for: {prompt}\nDescribed: "
    "{caption}"
)
MAX_TOKENS = 8
Verdicts = dict[str, list[Verdict]]


def judge_from_flags(options: argparse.Namespace, parts: Sequence[str]) -> Judge | None:
    """None without --judge. Raises SettingsError."""
    check_judge_numbers(options)
    if options.judge is None and options.judge_model is None:
        return None
    for flag, given in (("--judge", options.judge), ("--judge-model", options.judge_model)):
        if not given:
            raise SettingsError(
                flag, "is missing: a judge is --judge URL and --judge-model NAME together."
            )
    if "diagnosis" not in parts:
        raise SettingsError("--judge", "goes with the part diagnosis, which is not made here.")
    return judge_of(options)


def ask_judge(
    judge: Judge, plan: Plan, store: Store, folder: Path, parallel: int
) -> tuple[Verdicts, dict[str, Any]]:
    """({checkpoint: a verdict for each prompt}, what decides the verdicts and how many there are).
    The pictures lie in `folder` already. Answers are kept in its answers/, so that nothing is
    asked twice. Raises SettingsError if the endpoint answers nothing."""
    records = {key: store.joined(plan.diagnosis(key), "records") for key in plan.keys}
    questions = list(_questions(plan, records, folder))
    answers = KeptAnswers(folder, judge.model)
    try:
        with tqdm(total=len(questions), desc=judge.model, unit="answer", disable=None) as bar:
            outcome = ask_all(judge, questions, answers, parallel, bar.update)
    finally:
        answers.close()
    if questions and not outcome.values:
        causes = ", ".join(f"{cause} {count}" for cause, count in outcome.causes.items())
        raise SettingsError(
            "--judge", f"{judge.host} answered nothing that could be used ({causes})."
        )
    verdicts = {
        key: [_verdict(outcome, key, number) for number in range(len(of_key))]
        for key, of_key in records.items()
    }
    counts = {"questions": len(questions), "asked": outcome.asked, "kept": outcome.kept}
    return verdicts, judge.description() | counts | {"failures": outcome.causes}


def _questions(
    plan: Plan, records: dict[str, list[dict[str, Any]]], folder: Path
) -> Iterator[Question]:
    for key, of_key in records.items():
        for number, record in enumerate(of_key):
            prompt = record["prompt"]
            if plan.prompts[number].verdict(key) is None:
                picture = Picture(folder / picture_path(key, number))
                parts = (picture, DRAWN.format(prompt=prompt))
                yield Question(_key(key, number, "drawn"), parts, _is_yes, MAX_TOKENS)
            if needs_reader(record):
                text = READ.format(prompt=prompt, caption=record["caption"])
                yield Question(_key(key, number, "read"), (text,), _is_yes, MAX_TOKENS)


def _verdict(outcome: Outcome, key: str, number: int) -> Verdict:
    return Verdict(*(outcome.values.get(_key(key, number, what)) for what in ("drawn", "read")))


def _key(key: str, number: int, what: str) -> str:
    return f"{key}/{number}/{what}"


def _is_yes(reply: Reply) -> bool:
    return yes_or_no(reply.text)
