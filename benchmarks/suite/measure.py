"""Measures the modes of one recipe against each other: the same samples, alternating step by step.

A STAGE defines a step: `step` is DeepSpeed's whole optimizer step, `graph` is forward and backward
of the plain modules, where the naive code can run too. A round is one step of every mode on the
same packs; the order of modes rotates from round to round. A round is timed as a whole, or split
into phases, which synchronises with the device between them."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.suite.counting import counted_flops
from benchmarks.suite.models import random_building
from benchmarks.suite.naive import naive_decoder
from benchmarks.suite.packs import as_mode, images_of, is_adapted, is_naive
from benchmarks.suite.statistic import ratio
from benchmarks.suite.timing import Phases, peak_bytes, synchronise, waiting_in_collectives
from uno_ds.cost.step_flops import PASSES, Passes, Plan, attention_flops, step_flops, total
from uno_ds.cost.utilisation import peak_flops, plan_of
from uno_ds.cost.work import Work
from uno_ds.data.files import one_line
from uno_ds.objectives.uno import UnoObjective
from uno_ds.recipe import Recipe
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Sample
from uno_ds.training.loading import BatchPreparation

PHASES = (
    "data",
    "autoencoder",
    "visual encoder",
    "forward",
    "backward",
    "optimizer",
    "other",
    "communication",
)
BASELINES = (
    ("uno", "flow"),
    ("flow+caption", "flow"),
    ("flow+regression", "flow"),
    ("naive flow", "flow"),
    ("naive uno", "flow"),
    ("uno", "naive flow"),
    ("uno", "naive uno"),
    ("flow-lora", "flow"),
    ("uno-lora", "uno"),
    ("uno-lora", "flow-lora"),
)


class GraphStage:
    """Forward and backward of the plain modules, gradients dropped after it."""

    name, ranks = "graph", 1

    def __init__(self, recipe: Recipe, objective: UnoObjective, device: torch.device):
        self.recipe = recipe
        self.objective = objective
        self.device = device
        attention = recipe.kernels.resolved(recipe.kernel_demands).attention
        vision_plan = device.type != "cpu" or recipe.model.train == "all"
        self.prepare_batch = BatchPreparation(attention, device, vision_plan)

    def step(self, batches: list[PackedBatch], naive: bool, phases: Phases | None = None) -> None:
        losses = self.objective.losses
        totals = [sum(batch.loss_counts[name] for batch in batches) for name in losses]
        counts = torch.tensor(totals, dtype=torch.float32, device=self.device)
        forward: Callable[..., Any] = self.objective
        if phases:
            forward = phases.around("forward", forward)
        with naive_decoder(self.objective.model) if naive else nullcontext():
            for batch in batches:
                loss, _ = forward(batch.to(self.device), counts)
                backward = phases.around("backward", loss.backward) if phases else loss.backward
                backward()
        self.objective.zero_grad(set_to_none=True)

    def split(self, phases: Phases) -> ExitStack:
        return ExitStack()


class StepStage:
    """DeepSpeed's step at a learning rate of 0: all of its work, and every step starts from the
    same weights."""

    name = "step"

    def __init__(self, recipe: Recipe, device: torch.device, read_answers: bool, random: bool):
        from uno_ds.training.engine import Engine

        self.recipe = recipe
        self.device = device
        with random_building(recipe, device) if random else nullcontext():
            self.engine = Engine(recipe, device, read_answers)
        self.objective = self.engine.objective
        self.prepare_batch = self.engine.batch_preparation
        self.ranks = self.engine.world_size

    def step(self, batches: list[PackedBatch], naive: bool, phases: Phases | None = None) -> None:
        assert not naive, "naive code uses weights outside of their modules: impossible with ZeRO-3"
        run = phases.around("other", self.engine.train_step) if phases else self.engine.train_step
        run(batches, 0.0)

    def split(self, phases: Phases) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(phases.of(self.engine.engine, backward="backward", step="optimizer"))
        stack.enter_context(phases.of(self.objective, forward="forward"))
        return stack


Stage = GraphStage | StepStage


@dataclass
class Mode:
    """What was measured of one mode. batches, images_now, collating (seconds): of the current
    round."""

    step_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    work: list[Work] = field(default_factory=list)
    batches: list[PackedBatch] = field(default_factory=list)
    images_now: int = 0
    collating: float = 0.0
    peak_memory: int | None = None
    counted: int | None = None
    counted_batches: list[Work] = field(default_factory=list)


class Comparison:
    """Rounds of one stage over `modes`. `packs` yields the packs of this rank, `packs_of_step` of
    them for a step."""

    def __init__(
        self,
        stage: Stage,
        modes: list[str],
        packs: Iterator[list[Sample]],
        packs_of_step: int,
        collate: Collator,
        read_answers: bool,
        adapted: Stage | None = None,
    ):
        """`adapted`: the stage of the lora modes; None: `stage`."""
        self.stage = stage
        self.adapted = adapted or stage
        self.packs = packs
        self.packs_of_step = packs_of_step
        self.collate = collate
        self.read_answers = read_answers
        self.modes = {mode: Mode() for mode in modes}
        self.failed: dict[str, str] = {}
        self.rounds = 0

    def prepare(
        self,
        warmup: int,
        watch: bool = True,
        count: bool = True,
        after_mode: Callable[[], None] | None = None,
    ) -> None:
        """Untimed steps of every mode: `warmup` of them, and before these, with `watch`, one, one
        whose operations torch counts (unless not `count`), and one whose memory is measured. A
        naive mode that fails here is left out and noted in `failed`: the failure of a baseline is a
        result too. With `after_mode` each mode is timed once when it is ready, as a first round,
        and the function called: a run that is cut off has a row of every mode that it reached."""
        self._draw()
        if watch:
            for mode in list(self.modes):
                self._watch(mode, count)
                if after_mode is not None and mode in self.modes:
                    self._timed_step(mode)
                    after_mode()
            self.rounds += after_mode is not None
        for _ in range(warmup):
            self._draw()
            for mode in self.modes:
                self._step(mode)

    def _step(self, mode: str) -> None:
        self._stage_of(mode).step(self.modes[mode].batches, is_naive(mode))

    def _stage_of(self, mode: str) -> Stage:
        return self.adapted if is_adapted(mode) else self.stage

    def _watch(self, mode: str, count: bool) -> None:
        measured = self.modes[mode]
        step = partial(self._step, mode)
        try:
            if count:
                measured.counted = counted_flops(step)
                measured.counted_batches = [Work.of(batch) for batch in measured.batches]
            else:
                step()
            measured.peak_memory = peak_bytes(step, self.stage.device)
        except Exception as error:
            if not is_naive(mode):
                raise
            self.failed[mode] = one_line(error)
            del self.modes[mode]
            self.stage.objective.zero_grad(set_to_none=True)

    def round(self, split: bool) -> None:
        drawing = self._draw()
        modes = list(self.modes)
        first = self.rounds % len(modes)
        for mode in modes[first:] + modes[:first]:
            if split:
                self._split_step(mode, drawing)
            else:
                self._timed_step(mode)
        if not split:
            self.rounds += 1

    def _draw(self) -> float:
        """Packs for every mode; returns the seconds of drawing the samples, which modes share."""
        began = time.perf_counter()
        packs = [next(self.packs) for _ in range(self.packs_of_step)]
        drawing = time.perf_counter() - began
        for mode, measured in self.modes.items():
            began = time.perf_counter()
            kept = [as_mode(pack, mode) for pack in packs]
            measured.batches = [self.stage.prepare_batch(self.collate(pack)) for pack in kept]
            measured.collating = time.perf_counter() - began
            measured.images_now = sum(map(images_of, kept))
        return drawing

    def _timed_step(self, mode: str) -> None:
        measured = self.modes[mode]
        self._synchronise_ranks()
        began = time.perf_counter()
        began_cpu = time.process_time()
        self._step(mode)
        synchronise(self.stage.device)
        measured.step_seconds.append(time.perf_counter() - began)
        measured.cpu_seconds.append(time.process_time() - began_cpu)
        measured.tokens.append(sum(batch.tokens for batch in measured.batches))
        measured.images.append(measured.images_now)
        measured.work += [Work.of(batch) for batch in measured.batches]

    def _split_step(self, mode: str, drawing: float) -> None:
        measured = self.modes[mode]
        stage = self._stage_of(mode)
        clock = time.process_time if self.clock == "cpu_seconds" else time.perf_counter
        phases = Phases(stage.device, clock)
        waits = stage.ranks > 1 and stage.device.type == "cpu"
        self._synchronise_ranks()
        with (
            stage.split(phases),
            phases.of(stage.objective, latent_rows="autoencoder"),
            phases.of(stage.objective.model.vit, forward="visual encoder"),
            waiting_in_collectives() if waits else nullcontext([0.0]) as waited,
        ):
            stage.step(measured.batches, is_naive(mode), phases)
        for name in PHASES[1:-1]:
            measured.phases[name].append(phases.seconds[name])
        measured.phases["data"].append(drawing + measured.collating)
        if waits:
            measured.phases["communication"].append(waited[0])

    def _synchronise_ranks(self) -> None:
        synchronise(self.stage.device)
        if self.stage.ranks > 1:
            dist.barrier()

    @property
    def clock(self) -> str:
        """The times that ratios and phases are of. For one rank with one thread on a CPU processor
        time, which other processes on the machine disturb less."""
        on_cpu = self.stage.device.type == "cpu"
        one_thread = self.stage.ranks == 1 and torch.get_num_threads() == 1
        return "cpu_seconds" if on_cpu and one_thread else "step_seconds"

    def plain(self) -> dict[str, Any]:
        """{modes, ratios, clock, peak_flops, failed_modes} for the result file."""
        peak = peak_flops(self.stage.recipe, self.stage.device)
        modes = {
            mode: self._plain_mode(mode, measured, peak)
            for mode, measured in self.modes.items()
            if measured.step_seconds
        }
        ratios = {
            f"{above} / {below}": self._plain_ratio(modes[above], modes[below])
            for above, below in BASELINES
            if above in modes and below in modes
        }
        return {
            "modes": modes,
            "ratios": ratios,
            "clock": self.clock,
            "peak_flops": peak,
            "failed_modes": self.failed,
        }

    def _plain_ratio(self, above: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
        found = ratio(above[self.clock], below[self.clock])
        predicted = above["flops"]["predicted_total"] / below["flops"]["predicted_total"]
        unexplained = found["median"] / predicted - 1
        return {**found, "predicted": predicted, "unexplained": unexplained}

    def _plain_mode(self, mode: str, measured: Mode, peak: float | None) -> dict[str, Any]:
        shape = self.stage.recipe.architecture
        plan = self._plan(mode)
        steps = len(measured.step_seconds)
        seconds = sum(measured.step_seconds)
        parts: dict[str, Passes] = {}
        for work in measured.work:
            for name, passes in step_flops(shape, work, plan).items():
                parts[name] = parts.get(name, Passes()) + passes
        whole = total(parts)
        predicted = {
            name: {kind: getattr(passes, kind) / steps for kind in PASSES}
            for name, passes in parts.items()
        }
        return {
            "step_seconds": measured.step_seconds,
            "cpu_seconds": measured.cpu_seconds,
            "tokens": measured.tokens,
            "images": measured.images,
            "phases": {name: measured.phases[name] or None for name in PHASES},
            "peak_memory_bytes": measured.peak_memory,
            "tokens_per_second": sum(measured.tokens) / seconds * self.stage.ranks,
            "images_per_second": sum(measured.images) / seconds * self.stage.ranks,
            "flops": {
                "predicted": predicted,
                "predicted_total": whole.total / steps,
                "counted": measured.counted,
                **self._counted_step(mode, measured),
            },
            "mfu": whole.model / seconds / peak if peak else None,
            "hfu": whole.total / seconds / peak if peak else None,
        }

    def _counted_step(self, mode: str, measured: Mode) -> dict[str, Any]:
        """Of the step whose operations torch counted, without attention:
        {predicted_of_counted_step, unexplained: counted, with attention by the plan, over
        predicted, less 1}."""
        if measured.counted is None:
            return {"predicted_of_counted_step": None, "unexplained": None}
        shape = self.stage.recipe.architecture
        plan = self._plan(mode)
        predicted = attention = 0
        for work in measured.counted_batches:
            parts = step_flops(shape, work, plan)
            predicted += total(parts).total
            attention += attention_flops(parts, shape, work, plan).total
        unexplained = (measured.counted + attention) / predicted - 1
        return {"predicted_of_counted_step": predicted, "unexplained": unexplained}

    def _plan(self, mode: str) -> Plan:
        return plan_of(self._stage_of(mode).recipe, self.read_answers, is_naive(mode))


def run_rounds(
    comparison: Comparison,
    rounds: int,
    splits: int,
    deadline: float,
    after_round: Callable[[], None],
) -> None:
    """Runs `rounds` timed and `splits` split rounds, or until, on all ranks alike, the deadline
    (time.monotonic) has passed; calls `after_round` after each."""
    count = max(0, rounds - comparison.rounds) + splits
    for number in range(count):
        # The split rounds are spread over the others, so that the machine is in the same state.
        split = (number + 1) * splits // count > number * splits // count
        comparison.round(split)
        after_round()
        if _past(deadline, comparison.stage):
            return


def _past(deadline: float, stage: GraphStage | StepStage) -> bool:
    late = torch.tensor(float(time.monotonic() > deadline), device=stage.device)
    if stage.ranks > 1:
        dist.all_reduce(late)
    return bool(late)
