"""Does supervision help? Trains the arms of an experiment from one base, compares what they draw.

python -m benchmarks gain NAME_OR_FILE [--arms flow,uno] [--minutes 150] [--jobs 2] [--dry-run]
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.suite.command_line import Parser, names_of
from benchmarks.suite.gain_controller import Controller
from benchmarks.suite.gain_experiment import Experiment, read_experiment
from benchmarks.suite.gain_plan import (
    Planned,
    Speed,
    items_of,
    minutes,
    plan,
    plan_lines,
    seconds_of,
)
from benchmarks.suite.gain_report import verdicts, write_gain_report
from benchmarks.suite.gain_results import (
    collect,
    command_of,
    comparisons,
    contents_of,
    plain_point,
)
from benchmarks.suite.gain_runs import Machine
from benchmarks.suite.results import ROOT, ResultFile, shown_path
from uno_ds.settings import SettingsError, to_plain
from uno_ds.training.metrics import read_metrics


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    experiment = read_experiment(options.experiment)
    arms = chosen_arms(experiment, options.arms)
    output = (options.output or ROOT / "runs" / f"gain-{experiment.name}").resolve()
    threads = None if torch.cuda.is_available() else options.threads
    machine = Machine(options.jobs, threads)
    controller = Controller(options.experiment, experiment, output, machine)
    if options.measure:
        for job in options.measure:
            controller.measure(job)
        return 0
    if options.report_only:
        return report(controller, options, [])
    splits = ["validation", "test"] if options.test else ["validation"]
    notes = controller.check_samples()
    for note in notes:
        controller.say(note)
    if options.test:
        controller.say("the test prompts are drawn: choose no arm and no setting by what they show")
    speed = controller.time_arms(arms)
    budget = None if options.minutes is None else 60 * options.minutes
    planned = planned_items(controller, arms, splits, speed, budget, options.jobs)
    if options.dry_run:
        return 0
    left = [entry for entry in planned if entry.seconds]
    if left and all(entry.end is None for entry in left):
        raise SettingsError(
            "--minutes",
            f"is {options.minutes:g}, in which nothing of what is left fits; the shortest item "
            "above needs more. Give more minutes, fewer steps, or fewer prompts.",
        )
    # Of an item that seems to be done, the steps at another arm's cost may just become known.
    fitting = [entry.item for entry in planned if entry.end is not None]
    controller.carry_out(fitting, splits, budget)
    code = report(controller, options, notes)
    for failure in controller.failures:
        print(f"failed: {failure}")
    return 1 if controller.failures else code


def chosen_arms(experiment: Experiment, given: str | None) -> list[str]:
    """With the baseline, which the others are compared with."""
    if given is None:
        return list(experiment.arms)
    names = names_of("--arms", given, list(experiment.arms))
    return [arm for arm in experiment.arms if arm in names or arm == experiment.baseline]


def planned_items(
    controller: Controller,
    arms: Sequence[str],
    splits: Sequence[str],
    speed: Speed,
    budget: float | None,
    jobs: int,
) -> list[Planned]:
    """Prints the plan, and returns it."""
    items = items_of(controller.experiment, controller.output, arms, splits, speed)
    left = [seconds_of(item, speed, splits) for item in items]
    passed = controller.seconds_passed()
    room = None if budget is None else max(0.0, budget - passed)
    planned = plan(items, left, jobs, room)
    each = ", ".join(f"{arm} {speed.step[arm]:.3f} s" for arm in arms)
    baseline = controller.experiment.baseline
    costs = ", ".join(
        f"{arm} {speed.flops[arm] / speed.flops[baseline]:.3f}" for arm in arms if arm != baseline
    )
    controller.say(f"a step takes: {each}; FLOP of a step over {baseline}'s: {costs or '-'}")
    controller.say(
        f"starting a process takes {speed.start:.1f} s, a picture {speed.picture:.3f} s, the "
        f"losses and captions of a last point {speed.last:.1f} s; {minutes(passed)} have passed"
    )
    for line in plan_lines(planned, jobs, room):
        print(line, flush=True)
    return planned


def report(controller: Controller, options: argparse.Namespace, notes: Sequence[str]) -> int:
    """Writes gain.json and the page from everything that was measured, of this call or of earlier
    ones."""
    experiment = controller.experiment
    folder = options.out or ROOT / "benchmarks" / "results" / f"gain-{experiment.name}"
    found = collect(experiment, controller.output, controller.identity)
    recipe = controller.recipes[experiment.baseline]
    result = ResultFile(folder / "gain.json", "gain", recipe)
    command = command_of(found, options.experiment)
    result.details.update(
        {
            "experiment": to_plain(experiment) | {"recipe": shown_path(experiment.recipe)},
            "reproduce": command,
            "seconds_of_steps": seconds_of_training(controller),
            "prompts": contents_of(found),
            "comparisons": {
                split: [result.plain() for result in comparisons(found, split)]
                for split in ("validation", "test")
            },
        }
    )
    result.unknown.extend(notes)
    entries = [found.base] if found.base is not None else []
    for measured in [*entries, *found.points.values()]:
        result.measurements.append(plain_point(found, measured))
    hours = sum(result.details["seconds_of_steps"].values()) / 3600
    says = (
        f"{command}: {hours:.2f} process hours of training steps so far, on "
        f"{result.content['hardware']['cpu']}."
    )
    write_gain_report(folder, found, says, notes)
    result.finish()
    print(f"written: {folder / 'report.html'}")
    for line in verdicts(found):
        print(line)
    return 0


def seconds_of_training(controller: Controller) -> dict[str, float]:
    """By run."""
    found = {}
    for path in sorted(controller.output.glob("*-seed*/metrics.jsonl")):
        found[path.parent.name] = sum(row["step_seconds"] or 0 for row in read_metrics(path))
    return found


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="gain",
        description="Trains the arms of an experiment from one base, measures what they draw, and "
        "says whether they differ. A call that ends early is continued by the same call.",
    )
    parser.add_argument(
        "experiment",
        metavar="NAME_OR_FILE",
        help="an experiment in benchmarks/experiments or a YAML file (docs/gain.md)",
    )
    parser.add_argument(
        "--arms", metavar="A,B", help="only these arms, and the baseline (default: all)"
    )
    parser.add_argument(
        "--test",
        action="store_true",
        help="measure on the test prompts too, once the arms are chosen by the validation prompts",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="budget of this call: what does not fit is left to the next (default: none)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1 if torch.cuda.is_available() else max(1, os.cpu_count() or 1),
        help="processes at once (default: one for each core; on a GPU 1)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of each process on a CPU (default 1)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of the runs (default: runs/gain-NAME)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="of the result (default: benchmarks/results/gain-NAME)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="measure speeds, print the plan, train nothing"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="write the result from what is there"
    )
    parser.add_argument("--measure", action="append", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("jobs", "threads", "minutes"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} is above 0, got {value}")
    return options
