"""Carries out what is planned of an experiment."""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.suite.gain_experiment import BASE, Experiment, identity, recipe_of
from benchmarks.suite.gain_measure import Measurement
from benchmarks.suite.gain_plan import Item, Point, Speed, last_points, ready
from benchmarks.suite.gain_runs import (
    NOT_TIMED,
    TIMED_STEPS,
    ArmRun,
    Machine,
    measured_base,
    read_measured,
    run_child,
)
from benchmarks.suite.gain_statistics import table_of
from uno_ds.files_on_disk import replace_text
from uno_ds.recipe import Recipe
from uno_ds.run import Run, prepare
from uno_ds.sequence.segments import Kind, Sample
from uno_ds.settings import SettingsError
from uno_ds.training.run_folder import RunLock, new_run_id

# A call that is out of time stops a training this much before its end, so that it can save.
SECONDS_TO_SAVE = 15.0
COMPARED_PACKS = 4


class Controller:
    """Of one call. `name`: of the experiment, as it was given."""

    def __init__(self, name: str, experiment: Experiment, output: Path, machine: Machine):
        self.name, self.experiment, self.output, self.machine = name, experiment, output, machine
        self.recipes = {arm: recipe_of(experiment, arm) for arm in experiment.arms}
        self.measurement = Measurement(experiment, self.recipes[experiment.baseline])
        self.identity = self.measurement.identity()
        for arm in experiment.arms:
            for seed in experiment.seeds_of(arm):
                ArmRun(experiment, arm, seed, output).check()
        self.started = time.monotonic()
        self.failures: list[str] = []
        self._printing = threading.Lock()

    def say(self, line: str) -> None:
        with self._printing:
            print(f"[{self.seconds_passed() / 60:6.1f} min] {line}", flush=True)

    def seconds_passed(self) -> float:
        return time.monotonic() - self.started

    def check_samples(self) -> list[str]:
        """Reads and draws the data of all arms, and compares the first packs of each with the
        baseline's. Returns a sentence for each arm whose settings of data differ. Raises
        SettingsError where the settings are the same and the samples are not."""
        experiment, notes = self.experiment, []
        expected = first_samples(self._prepared(experiment.baseline))
        baseline = self.recipes[experiment.baseline]
        for arm, recipe in self.recipes.items():
            if recipe.data.scenes.held_out != baseline.data.scenes.held_out:
                message = "has another data.scenes.held_out than the baseline."
                raise SettingsError(f"arms.{arm}", message)
            if recipe.base != baseline.base:
                message = f"starts from {recipe.base}, the baseline from {baseline.base}."
                raise SettingsError(f"arms.{arm}", message)
            found = first_samples(self._prepared(arm))
            if found == expected:
                continue
            if shared_data(recipe) == shared_data(baseline):
                raise SettingsError(
                    f"arms.{arm}",
                    "would train on other samples than the baseline at equal steps, as its longer "
                    "samples fill a pack earlier: set data.max_samples_per_pack so low that "
                    f"sequence.token_budget ({recipe.sequence.token_budget}) never closes a pack.",
                )
            notes.append(f"Arm {arm} has other data than {experiment.baseline}, by its settings.")
        return notes

    def _prepared(self, arm: str) -> Run:
        overrides = self.experiment.overrides_of(arm)
        return prepare(self.experiment.recipe, overrides, reads_only=True, world_size=1)

    def measure_base(self) -> dict[str, Any]:
        """The base on the validation prompts: before any training."""
        path = measured_base(self.output)
        found = read_measured(path, self.identity)
        if found is None:
            self.say("measuring the base")
            self._measure([f"{BASE}:0:0:validation:{self.experiment.prompts}:1"], BASE)
            found = read_measured(path, self.identity)
            assert found is not None, "the child wrote it"
        return found

    def time_arms(self, arms: Sequence[str]) -> Speed:
        """Seconds and FLOP of a step of each arm, from short runs side by side as the real ones are
        started; kept for the next call."""
        base = self.measure_base()
        self.say(base_line(base))
        path = self.output / "speed.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        machine = f"{self.machine.jobs} processes, {self.machine.threads} threads"
        keys = {
            arm: identity([self.experiment.recipe, self.experiment.overrides_of(arm), machine])
            for arm in arms
        }
        missing = [arm for arm in arms if keys[arm] not in kept]
        if missing:
            self.say(f"timing {', '.join(missing)}: {TIMED_STEPS} steps each")
        with ThreadPoolExecutor(self.machine.jobs) as pool:
            timed = dict(zip(missing, pool.map(self._time, missing), strict=True))
        for arm, values in timed.items():
            kept[keys[arm]] = {"arm": arm, "machine": machine, **values}
        if missing:
            replace_text(path, json.dumps(kept, indent=1) + "\n")
        return Speed(
            {arm: self._step_seconds(arm) or kept[keys[arm]]["step"] for arm in arms},
            {arm: kept[keys[arm]]["flops"] for arm in arms},
            max(kept[keys[arm]]["start"] for arm in arms),
            base["drawing_seconds"] / base["prompts"],
            base["seconds"] - base["drawing_seconds"],
        )

    def _step_seconds(self, arm: str) -> float | None:
        """Of the newest run of the arm, which says more than a short one; None without any."""
        for seed in reversed(self.experiment.seeds_of(arm)):
            seconds = ArmRun(self.experiment, arm, seed, self.output).step_seconds()
            if seconds is not None:
                return seconds
        return None

    def _time(self, arm: str) -> dict[str, float]:
        run = ArmRun(self.experiment, arm, 0, self.output / "timing")
        words = run.train_command(TIMED_STEPS, self.machine)
        words, resume = words[: words.index("--resume")], words[words.index("--resume") :]
        if self.recipes[arm].objective.supervise_until < 1:
            # All timed steps are supervised: of an arm whose supervision ends the plan says more
            # than it takes.
            for whole_run in ("supervise_until=1", "supervision_decay=none"):
                words += ["--set", f"objective.{whole_run}"]
        words += ["--overwrite"] if run.saved_steps() else resume
        whole = run_child(words, self._log(f"timing-{arm}"), self.machine)
        rows = run.flops()
        seconds = run.step_seconds()
        assert seconds is not None, f"more than {NOT_TIMED} steps were timed"
        start = max(0.0, whole - TIMED_STEPS * seconds)
        return {"step": seconds, "flops": sum(rows) / len(rows), "start": start}

    def carry_out(self, items: Sequence[Item], splits: Sequence[str], budget: float | None) -> None:
        """As many items at once as the machine has processes for: the first of those that wait for
        no other. Failures are collected: one arm's does not end the others."""
        waiting, running = list(items), dict[Future[None], Item]()
        with ThreadPoolExecutor(self.machine.jobs) as pool:
            while waiting or running:
                free = self.machine.jobs - len(running)
                for item in ready(waiting, list(running.values()))[:free]:
                    waiting.remove(item)
                    running[pool.submit(self._carry_out, item, splits, budget)] = item
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    del running[future]
                    future.result()

    def _carry_out(self, item: Item, splits: Sequence[str], budget: float | None) -> None:
        try:
            if item.equal_to:
                self._beyond(item, splits, budget)
            else:
                self._to_last_step(item, budget)
        except SettingsError as error:
            self.failures.append(str(error))
            self.say(f"error: {error}")

    def _to_last_step(self, item: Item, budget: float | None) -> None:
        run = item.run
        points = [point for point in item.points if not self._has(run, point)]
        if points and self._train(run, item.steps, budget):
            self._measure_points(run, points)

    def _beyond(self, item: Item, splits: Sequence[str], budget: float | None) -> None:
        """The baseline at the cost of each arm, the cheapest first."""
        run, experiment = item.run, self.experiment
        targets = []
        for arm in item.equal_to:
            other = ArmRun(experiment, arm, run.seed, self.output)
            if not (other.is_trained() and run.is_trained()):
                self.say(f"{item.title}: waits for the end of {other.name} and {run.name}")
                continue
            targets.append(run.equal_flop_step(other))
        for steps in sorted(set(targets)):
            wanted = last_points(experiment, steps, splits)
            points = [point for point in wanted if not self._has(run, point)]
            if points and self._train(run, steps, budget):
                self._measure_points(run, points)

    def _has(self, run: ArmRun, point: Point) -> bool:
        found = read_measured(run.measured(point.step, point.split), self.identity)
        return found is not None and found["prompts"] == point.prompts

    def _train(self, run: ArmRun, steps: int, budget: float | None) -> bool:
        """Whether the run has a checkpoint at `steps` now."""
        if run.checkpoint(steps) is not None:
            return True
        hours = None
        if budget is not None:
            left = budget - self.seconds_passed() - SECONDS_TO_SAVE
            if left <= 0:
                self.say(f"{run.name}: no time is left in this call")
                return False
            hours = left / 3600
        run.remember()
        lock = RunLock(self.output / "locks" / run.name, new_run_id(), report=self.say)
        try:
            lock.acquire()
        except SettingsError:
            self.say(f"{run.name}: another call works on it")
            return False
        try:
            self.say(f"{run.name}: training to step {steps:,}")
            run_child(
                run.train_command(steps, self.machine, hours), self._log(run.name), self.machine
            )
        finally:
            lock.release()
        is_there = run.checkpoint(steps) is not None
        if not is_there:
            self.say(f"{run.name}: stopped before step {steps:,}; the next call continues")
        return is_there

    def _measure_points(self, run: ArmRun, points: Sequence[Point]) -> None:
        self.say(f"{run.name}: measuring {', '.join(f'{p.split} {p.step:,}' for p in points)}")
        jobs = []
        for point in points:
            job = f"{run.arm}:{run.seed}:{point.step}:{point.split}:{point.prompts}"
            jobs.append(f"{job}:{int(point.is_last)}")
        self._measure(jobs, run.name)

    def _measure(self, jobs: Sequence[str], name: str) -> None:
        words = ["-m", "benchmarks", "gain", self.name, "--output", str(self.output)]
        for job in jobs:
            words += ["--measure", job]
        run_child(words, self._log(name), self.machine)

    def _log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.txt"

    def measure(self, job: str) -> None:
        """In a child: ARM:SEED:STEP:SPLIT:PROMPTS:LAST, written to the file of the point."""
        arm, seed, step, split, prompts, last = job.split(":")
        run = ArmRun(self.experiment, arm, int(seed), self.output)
        if arm == BASE:
            model = self.recipes[self.experiment.baseline].base
            path = measured_base(self.output)
        else:
            model, path = run.checkpoint(int(step)), run.measured(int(step), split)
        if model is None:
            raise SettingsError("--measure", f"{run.name} has no checkpoint of step {step}.")
        found = self.measurement(model, split, int(prompts), last == "1")
        found |= {"arm": arm, "seed": int(seed), "step": int(step), "identity": self.identity}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(found, allow_nan=False) + "\n")


def base_line(base: Mapping[str, Any]) -> str:
    """How well the base draws the prompts, and reads pictures of held-out scenes."""
    table = table_of([base["rows"]])
    drawn = dict(zip(table.names(), table.means()[0].tolist(), strict=True))
    # A table of one kind of scene has no columns by kind.
    kinds = sorted({row["kind"] for row in base["rows"]})
    shares = {kind: drawn.get(f"all, {kind}", drawn["all"]) for kind in kinds}
    draws = ", ".join(f"{kind} {share:.1f} %" for kind, share in shares.items())
    read = base["captions_right"]["latents"]
    reads = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in read.items())
    return f"the base draws wholly right: {draws}; reads wholly right from clean latents: {reads}"


def first_samples(run: Run) -> list[tuple[Any, ...]]:
    """What the first packs hold, but for supervision: keys, noise levels, prompts and noise."""
    found = []
    for lane in run.stream(0, 1).lanes:
        for _ in range(COMPARED_PACKS):
            found += [_conditions(sample) for sample in lane.next_pack()]
    return found


def _conditions(sample: Sample) -> tuple[Any, ...]:
    noised = [segment for segment in sample.segments if segment.kind == Kind.NOISED]
    noises = [segment.noise.tobytes() for segment in noised if segment.noise is not None]
    texts = [tuple(segment.ids) for segment in sample.segments if segment.kind == Kind.TEXT]
    return sample.key, tuple(segment.timestep for segment in noised), tuple(noises), tuple(texts)


def shared_data(recipe: Recipe) -> list[Any]:
    """The settings that decide which samples there are, but for the token budget."""
    sequence = recipe.sequence
    drops = [sequence.drop_text, sequence.drop_vit, sequence.drop_latent, sequence.timestep_shift]
    return [recipe.data, drops, recipe.engine.packs_per_step, recipe.seed]
