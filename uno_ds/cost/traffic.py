"""Bytes that one rank sends (and receives, which is as much) in an optimizer step.

Collectives are counted as a ring carries them: an all-gather or a reduce-scatter of n bytes over R
ranks moves (R - 1) / R * n, an all-reduce twice that. What ZeRO-3 gathers is found by replaying the
rules of DeepSpeed's coordinator (0.19) over the order in which the modules run."""

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from uno_ds.cost.memory import Sharding
from uno_ds.cost.module_order import visits
from uno_ds.cost.parameters import Parameter


@dataclass(frozen=True)
class Traffic:
    """Bytes per rank and optimizer step."""

    gather_weights: int
    gather_within_node: int
    reduce_gradients: int

    @property
    def total(self) -> int:
        return self.gather_weights + self.gather_within_node + self.reduce_gradients


def traffic(parameters: list[Parameter], sharding: Sharding, recompute: bool) -> Traffic:
    """Of all micro-batches of an optimizer step. `recompute`: activation checkpointing."""
    moved = traffic_by_phase(parameters, sharding, recompute)
    ranks, value = sharding.ranks, sharding.value_bytes
    weights = moved.forward.weights + moved.backward.weights + moved.update.weights
    within = moved.forward.within_node + moved.backward.within_node
    return Traffic(
        gather_weights=_ring(value * weights, ranks),
        gather_within_node=_ring(value * within, sharding.secondary),
        reduce_gradients=_ring(value * moved.backward.gradients, ranks),
    )


@dataclass(frozen=True)
class Moved:
    """Elements of whole tensors that collectives move: weights gathered over all ranks and over the
    ranks of a node that share hpZ's second copy, and gradients reduced, those of an all-reduce
    counted twice."""

    weights: int = 0
    within_node: int = 0
    gradients: int = 0

    def seconds(self, sharding: Sharding, across: float, inside: float) -> tuple[float, float]:
        """(over all ranks, within nodes), of rings with these bytes per second of a rank."""
        value = sharding.value_bytes
        everywhere = _ring(value * (self.weights + self.gradients), sharding.ranks)
        return everywhere / across, _ring(value * self.within_node, sharding.secondary) / inside


@dataclass(frozen=True)
class MovedByPhase:
    forward: Moved
    backward: Moved
    update: Moved


def traffic_by_phase(
    parameters: list[Parameter], sharding: Sharding, recompute: bool
) -> MovedByPhase:
    """Of all micro-batches of an optimizer step, by the part of the step in which it is sent."""
    steps = sharding.accumulation
    trainable = sum(p.numel for p in parameters if p.trainable)
    # Stages 0 and 1 sum the gradients once a step, 2 and 3 after each micro-batch.
    reductions = (steps if sharding.stage >= 2 else 1) * (1 if sharding.scatters else 2)
    gradients = reductions * trainable
    if sharding.stage < 3:
        # Stages 1 and 2 gather the new weights after the step.
        update = Moved(weights=trainable if sharding.stage else 0)
        return MovedByPhase(Moved(), Moved(gradients=gradients), update)
    in_forward, in_backward = gathered(parameters, sharding, recompute)
    # After the step, every weight that is kept whole is gathered anew, frozen ones too.
    kept = _padded(sharding, (p for p in parameters if sharding.persistent(p)))
    update = Moved(weights=kept)
    if sharding.secondary == 1:
        forward = Moved(weights=steps * in_forward)
        backward = Moved(weights=steps * in_backward, gradients=gradients)
        return MovedByPhase(forward, backward, update)
    # A weight has its second copy from its first release on. The optimizer's step discards those of
    # trained weights; those of frozen ones last.
    renewed = _padded(
        sharding, (p for p in parameters if p.trainable and not sharding.persistent(p))
    )
    forward = Moved(weights=renewed, within_node=steps * in_forward - renewed)
    backward = Moved(within_node=steps * in_backward, gradients=gradients)
    return MovedByPhase(forward, backward, update)


def _padded(sharding: Sharding, parameters: Iterable[Parameter]) -> int:
    """Elements of the parameters with ZeRO-3's padding."""
    return sum(sharding.shard(parameter.numel) * sharding.ranks for parameter in parameters)


def gathered(parameters: list[Parameter], sharding: Sharding, recompute: bool) -> tuple[int, int]:
    """(elements gathered in forward, in backward) of one micro-batch under ZeRO-3, in steady state.

    A weight is gathered when its module is entered, or ahead of it: the queue of coming uses is
    read until one prefetch bucket of absent weights was found. It is dropped when its module is
    left, unless it is used again within the reuse distance, or the queue has been read beyond a
    later use of it."""
    numel = {p.name: p.numel for p in parameters}
    frozen = {p.name for p in parameters if not p.trainable}
    whole = {p.name for p in parameters if sharding.persistent(p)}
    modules: dict[str, list[str]] = {}
    for parameter in parameters:
        module = parameter.name.rpartition(".")[0]
        modules.setdefault(module, []).append(parameter.name)
    order = list(visits(modules, recompute))
    queue: deque[tuple[str, int]] = deque()
    for step, visit in enumerate(order):
        queue.extend((name, step) for name in modules[visit.module])
    read_for: dict[str, int] = defaultdict(lambda: -1)
    here = set(whole)
    live = 0
    moved = {"forward": 0, "backward": 0}

    def gather(names: list[str], backward: bool) -> None:
        nonlocal live
        here.update(names)
        live += sum(numel[name] for name in names)
        elements = sum(sharding.shard(numel[name]) * sharding.ranks for name in names)
        moved["backward" if backward else "forward"] += elements

    for step, visit in enumerate(order):
        names = modules[visit.module]
        gather([name for name in names if name not in here], visit.backward)
        for _ in range(sum(read_for[name] < step for name in names)):
            name, use = queue.popleft()
            read_for[name] = use
        ahead: list[str] = []
        room = min(sharding.max_live - live, sharding.prefetch)
        while queue and sum(numel[name] for name in ahead) < room:
            name, use = queue.popleft()
            read_for[name] = max(read_for[name], use)
            if name not in here and name not in ahead:
                ahead.append(name)
        gather(ahead, visit.backward)
        following = (modules[later.module] for later in islice(order, step + 1, None))
        soon = _soon(following, sharding.max_reuse, numel)
        dropped = {name for name in names if read_for[name] <= step and name not in soon}
        for module in visit.drops:
            dropped |= frozen.intersection(modules[module])
        dropped = (dropped & here) - whole
        here -= dropped
        live -= sum(numel[name] for name in dropped)
    return moved["forward"], moved["backward"]


def _soon(order: Iterable[list[str]], distance: int, numel: dict[str, int]) -> set[str]:
    """Parameters of the next modules, up to `distance` elements."""
    soon: set[str] = set()
    traversed = 0
    for names in order:
        if traversed >= distance:
            break
        soon.update(names)
        traversed += sum(numel[name] for name in names)
    return soon


def _ring(data: int, ranks: int) -> int:
    return data * (ranks - 1) // ranks
