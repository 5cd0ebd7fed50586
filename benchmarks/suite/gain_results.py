"""The result of an experiment: every number that was measured, the comparisons and the verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.suite.gain_experiment import BASE, Experiment
from benchmarks.suite.gain_runs import ArmRun, measured_base, read_measured
from benchmarks.suite.gain_statistics import Comparison, compare, t_interval, table_of
from uno_ds.evaluation.benchmarks.scenes import ASPECTS
from uno_ds.evaluation.table import Estimate

EQUAL_STEPS, EQUAL_FLOP = "at equal steps", "at equal FLOP"
Measured = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What is there of an experiment. points: by (arm, seed, step, split); equal_flop: step of the
    baseline by (arm, seed)."""

    experiment: Experiment
    base: Measured | None
    points: dict[tuple[str, int, int, str], Measured]
    equal_flop: dict[tuple[str, int], int]
    flops: dict[tuple[str, int], list[float]]

    def at(self, arm: str, step: int, split: str) -> dict[int, Measured]:
        """By seed."""
        return {
            seed: measured
            for (name, seed, at, of), measured in self.points.items()
            if (name, at, of) == (arm, step, split)
        }

    def beyond(self, arm: str, split: str) -> dict[int, Measured]:
        """The baseline at the cost of `arm`, by seed."""
        baseline = self.experiment.baseline
        found = {}
        for (name, seed), step in self.equal_flop.items():
            measured = self.points.get((baseline, seed, step, split))
            if name == arm and measured is not None:
                found[seed] = measured
        return found


def collect(experiment: Experiment, output: Path, wanted: str) -> Found:
    """`wanted`: identity of the measurement. Raises SettingsError where something was measured or
    trained with other settings."""
    points: dict[tuple[str, int, int, str], Measured] = {}
    flops: dict[tuple[str, int], list[float]] = {}
    for arm in experiment.arms:
        for seed in experiment.seeds_of(arm):
            run = ArmRun(experiment, arm, seed, output)
            run.check()
            for path in sorted(run.measured_folder.glob("step_*.json")):
                measured = read_measured(path, wanted)
                assert measured is not None, "the file exists"
                points[arm, seed, measured["step"], measured["split"]] = measured
            flops[arm, seed] = run.flops()
    equal_flop = {}
    for arm in experiment.arms:
        for seed in experiment.seeds_of(arm):
            base_flops = flops.get((experiment.baseline, seed), [])
            is_trained = len(flops[arm, seed]) >= experiment.steps_of(arm)
            if arm != experiment.baseline and is_trained and len(base_flops) >= experiment.steps:
                run = ArmRun(experiment, experiment.baseline, seed, output)
                equal_flop[arm, seed] = run.equal_flop_step(ArmRun(experiment, arm, seed, output))
    base = read_measured(measured_base(output), wanted)
    return Found(experiment, base, points, equal_flop, flops)


def comparisons(found: Found, split: str) -> list[Comparison]:
    """Every arm with the baseline, at equal steps and at equal FLOP, as far as both are there."""
    experiment = found.experiment
    baseline = experiment.baseline
    results = []
    for arm in experiment.arms:
        if arm == baseline:
            continue
        ours = _rows(found.at(arm, experiment.steps_of(arm), split))
        for at, theirs in (
            (words_of_steps(experiment, arm), found.at(baseline, experiment.steps, split)),
            (EQUAL_FLOP, found.beyond(arm, split)),
        ):
            result = compare(arm, baseline, at, ours, _rows(theirs))
            if result is not None:
                results.append(result)
    return results


def words_of_steps(experiment: Experiment, arm: str) -> str:
    """Where an arm and the baseline are compared at their own last steps."""
    steps = experiment.steps_of(arm)
    if steps == experiment.steps:
        return EQUAL_STEPS
    return f"after {steps:,} steps against {experiment.steps:,}"


def gaps_of(
    found: Found, values_of: str, split: str, beyond: bool
) -> dict[str, dict[str, Estimate]]:
    """{arm: {name: difference to the baseline, over seeds}}. `values_of`: "losses" or
    "alignment" of a measurement."""
    experiment = found.experiment
    gaps: dict[str, dict[str, Estimate]] = {}
    for arm in experiment.arms:
        ours = found.at(arm, experiment.steps_of(arm), split)
        theirs = found.at(experiment.baseline, experiment.steps, split)
        if beyond:
            theirs = found.beyond(arm, split)
        seeds = sorted(set(ours) & set(theirs))
        if arm == experiment.baseline or not seeds:
            continue
        gaps[arm] = {}
        our_values = [ours[seed][values_of] for seed in seeds]
        their_values = [theirs[seed][values_of] for seed in seeds]
        shared = set.intersection(*map(set, [*our_values, *their_values]))
        for name in filter(shared.__contains__, our_values[0]):
            differences = [
                our[name] - their[name] for our, their in zip(our_values, their_values, strict=True)
            ]
            gaps[arm][name] = t_interval(differences)
    return gaps


def means_of(measured: Sequence[Measured], first: int | None = None) -> dict[str, Estimate]:
    """Percent of pictures by column, over runs with their interval. `first`: only so many
    pictures."""
    by_run = []
    for entry in measured:
        table = table_of([entry["rows"][:first]])
        by_run.append(dict(zip(table.names(), table.means()[0].tolist(), strict=True)))
    names = by_run[0] if by_run else {}
    return {name: t_interval([run[name] for run in by_run]) for name in names}


def plain_point(found: Found, measured: Measured) -> dict[str, Any]:
    """A measurement of the result file."""
    arm, seed, step, split = (measured[key] for key in ("arm", "seed", "step", "split"))
    flops = found.flops.get((arm, seed), [])
    table = table_of([measured["rows"]])
    return {
        "name": f"{arm}, seed {seed}, step {step}, {split}",
        "arm": arm,
        "seed": None if arm == BASE else seed,
        "step": step,
        "split": split,
        "means": dict(zip(table.names(), table.means()[0].tolist(), strict=True)),
        "right": {
            aspect: "".join(str(row["right"][aspect]) for row in measured["rows"])
            for aspect in ASPECTS
        },
        "losses": measured.get("losses", {}),
        "alignment": measured.get("alignment", {}),
        "captions_right": measured.get("captions_right", {}),
        "flops": sum(flops[:step]) if len(flops) >= step > 0 else None,
        "seconds": measured["seconds"],
    }


def contents_of(found: Found) -> dict[str, list[str]]:
    """The contents of the prompts of each split, in the order of `right`."""
    longest: dict[str, list[str]] = {}
    for measured in [*found.points.values(), *([found.base] if found.base else [])]:
        contents = [row["content"] for row in measured["rows"]]
        if len(contents) > len(longest.get(measured["split"], [])):
            longest[measured["split"]] = contents
    return longest


def command_of(found: Found, experiment: str) -> str:
    """The command that makes what was found again. `experiment`: as it was given."""
    measured = {arm for arm, *_ in found.points}
    arms = [arm for arm in found.experiment.arms if arm in measured]
    words = f"python -m benchmarks gain {experiment}"
    if arms and len(arms) < len(found.experiment.arms):
        words += f" --arms {','.join(arms)}"
    return words + " --test" * any(split == "test" for *_, split in found.points)


def _rows(measured: Mapping[int, Measured]) -> dict[int, Any]:
    return {seed: entry["rows"] for seed, entry in measured.items()}
