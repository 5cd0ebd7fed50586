"""Measures the modes of one recipe against each other: the same samples, interleaved step by step.

A STAGE is what a step is: `step` is DeepSpeed's whole optimizer step, `graph` is forward and
backward of the plain modules, where the naive spelling can run too. A round is one step of every
mode on the same packs; the order of modes turns from round to round. A round is timed whole, or
split into phases, which waits for the device in between."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.suite.counting import counted_flops
from benchmarks.suite.models import random_building
from benchmarks.suite.naive import spelled_naively
from benchmarks.suite.packs import as_mode, images_of, is_naive
from benchmarks.suite.statistic import ratio
from benchmarks.suite.timing import Phases, peak_bytes, synchronise, waiting_in_collectives
from uno_ds.cost.step_flops import PASSES, Passes, attention_flops, step_flops, total
from uno_ds.cost.utilisation import peak_flops, plan_of
from uno_ds.cost.work import Work
from uno_ds.objectives.uno import LOSSES, UnoObjective
from uno_ds.recipe import Recipe
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Sample

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
)


class GraphStage:
    """Forward and backward of the plain modules, gradients dropped after it."""

    name, ranks = "graph", 1

    def __init__(self, recipe: Recipe, objective: UnoObjective, device: torch.device):
        self.recipe, self.objective, self.device = recipe, objective, device

    def step(self, batches: list[PackedBatch], naive: bool, phases: Phases | None = None) -> None:
        counts = torch.tensor(
            [sum(batch.loss_counts[name] for batch in batches) for name in LOSSES],
            dtype=torch.float32,
            device=self.device,
        )
        around = phases.around if phases else (lambda _, function: function)
        with spelled_naively(self.objective.model) if naive else nullcontext():
            for batch in batches:
                loss, _ = around("forward", self.objective)(batch.to(self.device), counts)
                around("backward", loss.backward)()
        self.objective.zero_grad(set_to_none=True)

    def split(self, phases: Phases) -> ExitStack:
        return ExitStack()


class StepStage:
    """DeepSpeed's step at a learning rate of 0: all of its work, and every step starts from the
    same weights."""

    name = "step"

    def __init__(self, recipe: Recipe, device: torch.device, read_answers: bool, random: bool):
        from uno_ds.training.engine import Engine

        self.recipe, self.device = recipe, device
        with random_building(recipe, device) if random else nullcontext():
            self.engine = Engine(recipe, device, read_answers)
        self.objective, self.ranks = self.engine.objective, self.engine.world_size

    def step(self, batches: list[PackedBatch], naive: bool, phases: Phases | None = None) -> None:
        assert not naive, (
            "the naive spelling uses weights outside of their modules, which ZeRO-3 does not allow"
        )
        run = phases.around("other", self.engine.train_step) if phases else self.engine.train_step
        run(batches, 0.0)

    def split(self, phases: Phases) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(phases.of(self.engine.engine, backward="backward", step="optimizer"))
        stack.enter_context(phases.of(self.objective, forward="forward"))
        return stack


@dataclass
class Mode:
    """What was measured of one mode; `batches` are those of the current round."""

    step_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    work: list[Work] = field(default_factory=list)
    batches: list[PackedBatch] = field(default_factory=list)
    peak_memory: int | None = None
    counted: int | None = None
    counted_batches: list[Work] = field(default_factory=list)


class Comparison:
    """Rounds of one stage over `modes`. `packs` gives the packs of this rank, `each` of them a
    step."""

    def __init__(
        self,
        stage: GraphStage | StepStage,
        modes: list[str],
        packs: Iterator[list[Sample]],
        each: int,
        collate: Collator,
        read_answers: bool,
    ):
        self.stage, self.packs, self.each, self.collate, self.read_answers = (
            stage,
            packs,
            each,
            collate,
            read_answers,
        )
        self.modes = {mode: Mode() for mode in modes}
        self.failed: dict[str, str] = {}
        self.rounds = 0

    def prepare(self, warmup: int, watch: bool = True) -> None:
        """Untimed steps of every mode: `warmup` of them, and before them, to `watch`, one that
        torch counts and one whose memory is taken. A naive mode that fails here is left out and
        told in `failed`: a baseline's trouble is a result, not the end."""
        self._draw()
        for mode, measured in list(self.modes.items()):

            def step(mode: str = mode, measured: Mode = measured) -> None:
                self.stage.step(measured.batches, is_naive(mode))

            if not watch:
                continue
            try:
                measured.counted = counted_flops(step)
                measured.counted_batches = [Work.of(batch) for batch in measured.batches]
                step()
                measured.peak_memory = peak_bytes(step, self.stage.device)
            except Exception as error:
                if not is_naive(mode):
                    raise
                self.failed[mode] = (
                    f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                )
                del self.modes[mode]
                self.stage.objective.zero_grad(set_to_none=True)
        for _ in range(warmup):
            self._draw()
            for mode, measured in self.modes.items():
                self.stage.step(measured.batches, is_naive(mode))

    def round(self, split: bool) -> None:
        drawing = self._draw()
        order = list(self.modes)
        turn = self.rounds % len(order)
        for mode in order[turn:] + order[:turn]:
            (self._split_step if split else self._timed_step)(mode, drawing)
        self.rounds += not split

    def _draw(self) -> float:
        """Packs for every mode; returns the seconds of drawing the samples, which modes share."""
        start = time.perf_counter()
        packs = [next(self.packs) for _ in range(self.each)]
        drawing = time.perf_counter() - start
        for mode, measured in self.modes.items():
            start = time.perf_counter()
            kept = [as_mode(pack, mode) for pack in packs]
            measured.batches = [self.collate(pack) for pack in kept]
            measured.collating, measured.images_now = (
                time.perf_counter() - start,
                sum(map(images_of, kept)),
            )
        return drawing

    def _timed_step(self, mode: str, _: float) -> None:
        measured = self.modes[mode]
        self._together()
        start, start_cpu = time.perf_counter(), time.process_time()
        self.stage.step(measured.batches, is_naive(mode))
        synchronise(self.stage.device)
        measured.step_seconds.append(time.perf_counter() - start)
        measured.cpu_seconds.append(time.process_time() - start_cpu)
        measured.tokens.append(sum(batch.tokens for batch in measured.batches))
        measured.images.append(measured.images_now)
        measured.work += [Work.of(batch) for batch in measured.batches]

    def _split_step(self, mode: str, drawing: float) -> None:
        measured, stage = self.modes[mode], self.stage
        phases = Phases(
            stage.device, time.process_time if self.clock == "cpu_seconds" else time.perf_counter
        )
        waits = stage.ranks > 1 and stage.device.type == "cpu"
        self._together()
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

    def _together(self) -> None:
        synchronise(self.stage.device)
        if self.stage.ranks > 1:
            dist.barrier()

    @property
    def clock(self) -> str:
        """Of ratios and phases. One rank with one thread on a CPU: processor time, which others on
        the machine disturb less."""
        alone = (
            self.stage.device.type == "cpu"
            and self.stage.ranks == 1
            and torch.get_num_threads() == 1
        )
        return "cpu_seconds" if alone else "step_seconds"

    def plain(self) -> dict[str, Any]:
        """{modes, ratios, clock, peak_flops, failed_modes} for the result file."""
        recipe, device = self.stage.recipe, self.stage.device
        peak = peak_flops(recipe, device)
        modes = {
            mode: self._plain_mode(mode, measured, peak)
            for mode, measured in self.modes.items()
            if measured.step_seconds
        }
        clock, ratios = self.clock, {}
        for above, below in BASELINES:
            if above in modes and below in modes:
                predicted = (
                    modes[above]["flops"]["predicted_total"]
                    / modes[below]["flops"]["predicted_total"]
                )
                found = ratio(modes[above][clock], modes[below][clock])
                ratios[f"{above} / {below}"] = {
                    **found,
                    "predicted": predicted,
                    "unexplained": found["median"] / predicted - 1,
                }
        return {
            "modes": modes,
            "ratios": ratios,
            "clock": clock,
            "peak_flops": peak,
            "failed_modes": self.failed,
        }

    def _plain_mode(self, mode: str, measured: Mode, peak: float | None) -> dict[str, Any]:
        recipe, shape = self.stage.recipe, self.stage.recipe.architecture
        plan = plan_of(recipe, self.read_answers, "naive" if is_naive(mode) else "structured")
        seconds = sum(measured.step_seconds)
        parts: dict[str, Passes] = {}
        for work in measured.work:
            for name, passes in step_flops(shape, work, plan).items():
                parts[name] = parts.get(name, Passes()) + passes
        steps, whole = len(measured.step_seconds), total(parts)
        predicted = unexplained = None
        if measured.counted is not None:
            same = [(step_flops(shape, work, plan), work) for work in measured.counted_batches]
            predicted = sum(total(one).total for one, _ in same)
            attention = sum(attention_flops(one, shape, work, plan).total for one, work in same)
            unexplained = (measured.counted + attention) / predicted - 1
        alone = self.stage.ranks == 1
        return {
            "step_seconds": measured.step_seconds,
            "cpu_seconds": measured.cpu_seconds,
            "tokens": measured.tokens,
            "images": measured.images,
            "phases": {name: measured.phases[name] or None for name in PHASES},
            "peak_memory_bytes": measured.peak_memory,
            "tokens_per_second": sum(measured.tokens)
            / seconds
            * (1 if alone else self.stage.ranks),
            "images_per_second": sum(measured.images)
            / seconds
            * (1 if alone else self.stage.ranks),
            "flops": {
                "predicted": {
                    name: {kind: getattr(passes, kind) / steps for kind in PASSES}
                    for name, passes in parts.items()
                },
                "predicted_total": whole.total / steps,
                "counted": measured.counted,
                "predicted_of_counted_step": predicted,
                "unexplained": unexplained,
            },
            "mfu": whole.model / seconds / peak if peak else None,
            "hfu": whole.total / seconds / peak if peak else None,
        }


def run_rounds(
    comparison: Comparison, rounds: int, splits: int, deadline: float, written: Callable[[], None]
) -> None:
    """Rounds until they are done or, all ranks alike, the deadline (time.monotonic) has passed;
    `written` after each timed one."""
    for number in range(rounds + splits):
        # The split rounds come in between, so that they see the machine as the timed ones do.
        comparison.round(
            split=(number + 1) * splits // (rounds + splits) > number * splits // (rounds + splits)
        )
        written()
        if _past(deadline, comparison.stage):
            return


def _past(deadline: float, stage: GraphStage | StepStage) -> bool:
    late = torch.tensor(float(time.monotonic() > deadline), device=stage.device)
    if stage.ranks > 1:
        dist.all_reduce(late)
    return bool(late)
