"""Time of an optimizer step on few to many GPUs under each ZeRO stage, with what overlaps and what
bounds it.

A step has three parts: forward, backward, and the update with the gathers after it. Within a part,
sending overlaps with computing if DeepSpeed's `overlap_comm` is on; the parts follow each other:

    step = max(computing, sending) of forward + the same of backward + sending of the update

What is left out is in `assumptions` of `step_time`; latencies of collectives, which grow with the
number of ranks, are left out too."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uno_ds.cost.fit import needs_of, sharding_of
from uno_ds.cost.memory import Sharding
from uno_ds.cost.parameters import Parameter, parameters_of
from uno_ds.cost.scenario import Scenario
from uno_ds.cost.step_flops import Passes, step_flops, total
from uno_ds.cost.traffic import traffic_by_phase
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import work_of
from uno_ds.settings import SettingsError

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
# Configurations that ship; the last has hpZ.
CONFIGURATIONS = ("zero1", "zero2", "zero3", "zero3_multinode")
COMPUTING, NETWORK, LINK, MEMORY = "computing", "network between hosts", "links in a host", "memory"


@dataclass(frozen=True)
class Links:
    """Bytes per second and direction. inside: of a GPU to the others of its host; across: of a
    host to others, by all of its cards together. per_host: GPUs. reached: the share of both that
    large collectives reach."""

    inside: float
    across: float
    per_host: int
    reached: float

    def ring(self, ranks: int) -> tuple[float, str]:
        """(bytes per second of a rank in a ring over all ranks, what bounds it). A ring leaves each
        host once, and a collective has a ring over each card."""
        if ranks <= self.per_host or self.inside < self.across:
            return self.inside * self.reached, LINK
        return self.across * self.reached, NETWORK


@dataclass(frozen=True)
class Part:
    """Seconds of one part of the step. everywhere, within: sending over all ranks and within
    hosts."""

    name: str
    computing: float
    everywhere: float
    within: float
    overlaps: bool

    @property
    def sending(self) -> float:
        return self.everywhere + self.within

    @property
    def seconds(self) -> float:
        both = self.computing, self.sending
        return max(both) if self.overlaps else sum(both)


@dataclass(frozen=True)
class Point:
    """A step on so many GPUs. bound: what takes most of its time, or MEMORY where `peak` bytes do
    not fit. gpu_hours: of 1,000 packs."""

    configuration: str
    gpus: int
    seconds: float
    computing: float
    exposed: float
    bound: str
    peak: int
    gpu_hours: float


def parts_of_step(
    parameters: list[Parameter],
    sharding: Sharding,
    recompute: bool,
    flop: Passes,
    rate: float,
    links: Links,
    overlaps: bool,
) -> list[Part]:
    """`flop`: of one micro-batch. `rate`: FLOP per second that a GPU reaches."""
    moved = traffic_by_phase(parameters, sharding, recompute)
    across, _ = links.ring(sharding.ranks)
    inside, _ = links.ring(sharding.secondary)
    forward = sharding.accumulation * flop.forward / rate
    backward = sharding.accumulation * (flop.total - flop.forward) / rate
    return [
        Part("forward", forward, *moved.forward.seconds(sharding, across, inside), overlaps),
        Part("backward", backward, *moved.backward.seconds(sharding, across, inside), overlaps),
        Part("update", 0.0, *moved.update.seconds(sharding, across, inside), False),
    ]


def bound_of(parts: Iterable[Part], ring: str) -> str:
    """What the largest share of the step's seconds is spent on. `ring`: what bounds a ring over all
    ranks."""
    shares = {COMPUTING: 0.0, NETWORK: 0.0, LINK: 0.0}
    for part in parts:
        computing = part.computing
        if part.overlaps and part.computing < part.sending:
            computing = 0.0
        shares[COMPUTING] += computing
        if not part.overlaps or part.computing < part.sending:
            shares[ring] += part.everywhere
            shares[LINK] += part.within
    return max(shares, key=lambda name: shares[name])


def flop_of(recipe: "Recipe", pack: Scenario, adapters: bool = True) -> Passes:
    """`adapters`: those of the recipe, if it has any; without, the whole generation expert
    trains."""
    work = work_of(recipe.architecture, pack)
    plan = plan_of(recipe, read_answers=False)
    if not adapters:
        plan = dataclasses.replace(plan, adapters=None)
    return total(step_flops(recipe.architecture, work, plan))


def overlaps_of(recipe: "Recipe") -> bool:
    """DeepSpeed's default is to overlap under ZeRO-3 only."""
    zero = recipe.deepspeed_config()["zero_optimization"]
    return bool(zero.get("overlap_comm", zero["stage"] == 3))


def scaling(
    recipe: "Recipe",
    pack: Scenario,
    rate: float,
    links: Links,
    capacity: int | None,
    gpu_counts: Sequence[int] = GPU_COUNTS,
) -> list[Point]:
    """Points of all configurations that the recipe can run with, one pack a GPU and step.
    `capacity`: bytes of a GPU; None: not compared."""
    parameters = parameters_of(recipe)
    flop = flop_of(recipe, pack)
    points = []
    for configuration in CONFIGURATIONS:
        for gpus in gpu_counts:
            on_gpus = _on(recipe, configuration, gpus)
            if on_gpus is not None:
                points.append(_point(on_gpus, gpus, pack, parameters, flop, rate, links, capacity))
    return points


def _on(recipe: "Recipe", configuration: str, gpus: int) -> "Recipe | None":
    """None where the recipe cannot run with the configuration, as quantised weights with ZeRO-3."""
    engine = dataclasses.replace(recipe.engine, deepspeed=configuration, packs_per_step=gpus)
    try:
        return dataclasses.replace(recipe, engine=engine)
    except SettingsError:
        return None


def _point(
    recipe: "Recipe",
    gpus: int,
    pack: Scenario,
    parameters: list[Parameter],
    flop: Passes,
    rate: float,
    links: Links,
    capacity: int | None,
) -> Point:
    sharding = sharding_of(recipe, gpus)
    overlaps, recompute = overlaps_of(recipe), recipe.model.recompute
    parts = parts_of_step(parameters, sharding, recompute, flop, rate, links, overlaps)
    seconds = sum(part.seconds for part in parts)
    computing = sum(part.computing for part in parts)
    peak = needs_of(recipe, parameters, sharding, {"pack": pack})["pack"].peak
    fits = capacity is None or peak <= capacity
    return Point(
        configuration=recipe.engine.deepspeed,
        gpus=gpus,
        seconds=seconds,
        computing=computing,
        exposed=seconds - computing,
        bound=bound_of(parts, links.ring(gpus)[1]) if fits else MEMORY,
        peak=peak,
        gpu_hours=1000 * seconds / 3600,
    )
