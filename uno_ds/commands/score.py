"""`evaluate.py score`: by program, by local models, or by a judge."""

import argparse
import sys

from uno_ds.commands.evaluate_flags import check_counts
from uno_ds.commands.sample import device_of
from uno_ds.evaluation.benchmark import JUDGE, PROGRAM
from uno_ds.evaluation.benchmarks import get_benchmark, variant_of
from uno_ds.evaluation.benchmarks.geneval import GenEval
from uno_ds.evaluation.folder import read_record
from uno_ds.evaluation.judge import Judge, check_fields
from uno_ds.evaluation.judge_scoring import score_by_judge
from uno_ds.evaluation.local_scoring import score_captions, score_geneval
from uno_ds.evaluation.results import Result, shown
from uno_ds.evaluation.scoring import Scored, open_scored, score_by_program
from uno_ds.settings import SettingsError

LONGEST_TIMEOUT, MOST_RETRIES = 86_400, 1000


def judge_of(options: argparse.Namespace) -> Judge:
    """The judge of `add_judge_flags`, with a warning if its key goes unencrypted. Raises
    SettingsError."""
    judge = Judge(
        options.judge,
        options.judge_model,
        options.timeout,
        options.retries,
        check_fields(options.judge_options),
    )
    if judge.shows_key:
        line = f"warning: --judge: the key goes to {judge.host} over http, unencrypted"
        print(line, file=sys.stderr, flush=True)
    return judge


def check_judge_numbers(options: argparse.Namespace) -> None:
    """Raises SettingsError for a number of `add_judge_flags` that is out of its range."""
    check_counts(options, "parallel")
    if not 0 < options.timeout <= LONGEST_TIMEOUT:
        raise SettingsError("--timeout", f"must be above 0 and at most {LONGEST_TIMEOUT:,} s.")
    if not 0 <= options.retries <= MOST_RETRIES:
        raise SettingsError("--retries", f"must be 0 to {MOST_RETRIES}.")


def score(options: argparse.Namespace) -> None:
    check_judge_numbers(options)
    benchmark = get_benchmark(options.benchmark)
    # That of the images, unless one is given.
    record = read_record(options.images) or {}
    recorded = record.get("variant") if record.get("benchmark") == benchmark.name else None
    variant = variant_of(benchmark, options.variant or recorded or None)
    _check_scorer(options, benchmark.name, benchmark.scored_by)
    scored = open_scored(benchmark, options.images, options.data, variant, options.allow_missing)
    result = _score(scored, options)
    path = result.write()
    print_result(result)
    print(f"written to {path}", flush=True)


def print_result(result: Result) -> None:
    """The estimates of a result, a line each, and what could not be scored."""
    name = f"{result.benchmark} {result.variant}".strip()
    print(f"{name} of {result.label} by {result.scorer['name']}, {len(result.rows)} prompts:")
    for column, estimate in result.estimates().items():
        print(f"  {column}: {shown(estimate)}")
    if result.failures:
        causes = ", ".join(f"{cause} {count}" for cause, count in result.failures.items())
        print(f"  not scored: {causes}")


def _check_scorer(options: argparse.Namespace, name: str, scored_by: str) -> None:
    """Refuses flags that another kind of scorer has."""
    if options.judge is not None and scored_by != JUDGE:
        raise SettingsError("--judge", f"does not go with {name}, which no judge scores.")
    if options.local and scored_by == JUDGE:
        message = f"does not go with {name}, which is scored by a judge: give --judge URL."
        raise SettingsError("--local", message)
    if scored_by != JUDGE:
        return
    for flag, given in (("--judge", options.judge), ("--judge-model", options.judge_model)):
        if not given:
            message = f"is required for {name}: an OpenAI-compatible endpoint and its model."
            raise SettingsError(flag, message)


def _score(scored: Scored, options: argparse.Namespace) -> Result:
    if scored.benchmark.scored_by == PROGRAM:
        return score_by_program(scored)
    if scored.benchmark.scored_by == JUDGE:
        judge = judge_of(options)
        return score_by_judge(scored, judge, options.judge_prompts, options.parallel)
    device = device_of(options.device)
    if isinstance(scored.benchmark, GenEval):
        return score_geneval(scored, options.detector, options.clip, device)
    return score_captions(scored, options.clip, device, options.references, options.inception)
