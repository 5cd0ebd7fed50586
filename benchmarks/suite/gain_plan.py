"""What is left to do of an experiment, how long it takes, and what fits into a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.suite.gain_experiment import Experiment
from benchmarks.suite.gain_runs import ArmRun


@dataclass(frozen=True)
class Point:
    """To be measured: a step of a run on the prompts of a split."""

    step: int
    split: str
    prompts: int
    is_last: bool


@dataclass(frozen=True)
class Item:
    """A run that is trained to `steps` and measured at `points`. `equal_to`: the arms at whose
    cost the baseline is measured; their steps are known when they are trained."""

    run: ArmRun
    steps: int
    points: list[Point]
    equal_to: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        beyond = f" (cost of {', '.join(self.equal_to)})" if self.equal_to else ""
        return f"{self.run.name} to step {self.steps:,}{beyond}"


@dataclass(frozen=True)
class Speed:
    """Seconds, as measured. step: by arm; start: of a process; picture; last: what a last point
    takes besides its pictures. flops: of a step, by arm."""

    step: Mapping[str, float]
    flops: Mapping[str, float]
    start: float
    picture: float
    last: float


@dataclass(frozen=True)
class Planned:
    """seconds: of one item; end: when it is done, None if it does not fit."""

    item: Item
    seconds: float
    end: float | None


def items_of(
    experiment: Experiment,
    output: Path,
    arms: Sequence[str],
    splits: Sequence[str],
    speed: Speed | None = None,
) -> list[Item]:
    """Of the chosen arms, in an order in which an early end leaves whole seeds: seed by seed, the
    arms, then the baseline's training beyond their steps."""
    found = []
    for seed in max((experiment.seeds_of(arm) for arm in arms), key=len):
        chosen = [arm for arm in arms if seed in experiment.seeds_of(arm)]
        for arm in chosen:
            run = ArmRun(experiment, arm, seed, output)
            steps = experiment.steps_of(arm)
            found.append(Item(run, steps, curve_points(experiment, arm, splits)))
        others = [arm for arm in chosen if arm != experiment.baseline]
        if experiment.baseline in chosen and others:
            run = ArmRun(experiment, experiment.baseline, seed, output)
            steps = experiment.steps if speed is None else expected_steps(experiment, others, speed)
            found.append(Item(run, steps, [], others))
    return found


def curve_points(experiment: Experiment, arm: str, splits: Sequence[str]) -> list[Point]:
    *early, last = experiment.curve_steps(arm)
    points = [Point(step, "validation", experiment.curve_prompts, False) for step in early]
    return points + last_points(experiment, last, splits)


def last_points(experiment: Experiment, step: int, splits: Sequence[str]) -> list[Point]:
    return [Point(step, split, experiment.prompts, True) for split in splits]


def expected_steps(experiment: Experiment, arms: Sequence[str], speed: Speed) -> int:
    """Steps of the baseline that cost what the most expensive of the arms costs."""
    own = speed.flops[experiment.baseline]
    costs = [experiment.steps_of(arm) * speed.flops[arm] / own for arm in arms]
    return max(experiment.steps, round(max(costs)))


def seconds_of(item: Item, speed: Speed, splits: Sequence[str]) -> float:
    """What is left of an item."""
    if item.equal_to:
        return _seconds_beyond(item, speed, splits)
    run = item.run
    points = [point for point in item.points if not is_measured(run, point)]
    trained = max(run.saved_steps(), default=0)
    return _seconds(run, max(0, item.steps - trained), points, speed)


def _seconds_beyond(item: Item, speed: Speed, splits: Sequence[str]) -> float:
    """Of the baseline at the cost of each arm, from the cheapest one on."""
    run, experiment = item.run, item.run.experiment
    targets = set()
    for arm in item.equal_to:
        other = ArmRun(experiment, arm, run.seed, run.output)
        is_known = run.is_trained() and other.is_trained()
        expected = expected_steps(experiment, [arm], speed)
        targets.add(run.equal_flop_step(other) if is_known else expected)
    total, before = 0.0, experiment.steps
    for step in sorted(targets):
        wanted = last_points(experiment, step, splits)
        points = [point for point in wanted if not is_measured(run, point)]
        saved = [before, *(kept for kept in run.saved_steps() if kept <= step)]
        if points:
            total += _seconds(run, step - max(saved), points, speed)
            before = step
    return total


def _seconds(run: ArmRun, steps: int, points: Sequence[Point], speed: Speed) -> float:
    starts = int(steps > 0) + int(bool(points))
    pictures = sum(point.prompts for point in points)
    last = sum(point.is_last for point in points)
    of_steps, of_starts = steps * speed.step[run.arm], starts * speed.start
    return of_steps + of_starts + pictures * speed.picture + last * speed.last


def is_measured(run: ArmRun, point: Point) -> bool:
    return run.measured(point.step, point.split).exists()


def ready(waiting: Sequence[Item], running: Sequence[Item]) -> list[Item]:
    """Of the waiting items those that can begin: the baseline beyond its steps needs its own run
    and those whose cost it is to reach."""
    to_come = {item.run.name for item in [*waiting, *running] if not item.equal_to}
    return [item for item in waiting if not to_come & needed_by(item)]


def needed_by(item: Item) -> set[str]:
    """Names of the runs that an item waits for."""
    if not item.equal_to:
        return set()
    return {item.run.name, *(f"{arm}-seed{item.run.seed}" for arm in item.equal_to)}


def plan(
    items: Sequence[Item], seconds: Sequence[float], jobs: int, budget: float | None
) -> list[Planned]:
    """The items in their order, as they are carried out: a process that is free takes the first one
    that is ready. One that would end after the budget is left out. Without anything left to do an
    item takes no time and fits."""
    needed = {item.title: taken for item, taken in zip(items, seconds, strict=True)}
    ends: dict[str, float | None] = {}
    waiting, running, now = list(items), list[tuple[float, Item]](), 0.0
    while waiting or running:
        can_begin = ready(waiting, [item for _, item in running])
        if not can_begin or len(running) == jobs:
            first = min(running, key=lambda entry: entry[0])
            running.remove(first)
            now = first[0]
            continue
        item = can_begin[0]
        waiting.remove(item)
        end = now + needed[item.title]
        fits = not needed[item.title] or budget is None or end <= budget
        ends[item.title] = end if fits else None
        if fits:
            running.append((end, item))
    return [Planned(item, needed[item.title], ends[item.title]) for item in items]


def plan_lines(planned: Sequence[Planned], jobs: int, budget: float | None) -> list[str]:
    lines = []
    for entry in planned:
        if not entry.seconds:
            lines.append(f"  {entry.item.title}: done")
            continue
        when = f"done after {minutes(entry.end)}" if entry.end is not None else "DOES NOT FIT"
        lines.append(f"  {entry.item.title}: {minutes(entry.seconds)}, {when}")
    fitting = [entry.end for entry in planned if entry.end is not None and entry.seconds]
    whole = sum(entry.seconds for entry in planned)
    total = f"{minutes(max(fitting, default=0.0))} with {jobs} process(es) at once"
    rest = sum(entry.end is None for entry in planned)
    lines.append(f"this call: {total}; everything that is left: {minutes(whole / jobs)}")
    if rest:
        given = "" if budget is None else f" of {minutes(budget)}"
        lines.append(f"{rest} item(s) do not fit into the budget{given}: call again")
    return lines


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
