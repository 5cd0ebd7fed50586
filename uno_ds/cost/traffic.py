"""Bytes that one rank sends (and receives, which is as much) in an optimizer step.

Collectives are counted as a ring carries them: an all-gather or a reduce-scatter of n bytes over R ranks moves
(R - 1) / R * n, an all-reduce twice that. Under ZeRO-3 the weights of a module are gathered when it is entered and
dropped after it unless they are needed again within `stage3_max_reuse_distance` parameters; this is replayed over the
order in which the modules run.
"""
from collections.abc import Iterator
from dataclasses import dataclass

from uno_ds.cost.memory import Sharding
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
    ranks, value, steps = sharding.ranks, sharding.value_bytes, sharding.accumulation
    trainable = value * sum(p.numel for p in parameters if p.trainable)
    if sharding.stage < 3:
        # Stage 0 sums the gradients with one all-reduce; 1 and 2 scatter them and gather the new weights.
        reductions = steps if sharding.stage == 2 else 1
        ring = 2 * trainable if sharding.stage == 0 else reductions * trainable
        return Traffic(_ring(trainable, ranks) if sharding.stage else 0, 0, _ring(ring, ranks))
    first, again = (value * elements for elements in gathered(parameters, sharding, recompute))
    kept = value * sum(p.numel for p in parameters if p.trainable and sharding.persistent(p))
    within = steps * again if sharding.secondary > 1 else 0
    world = steps * first + (0 if within else steps * again) + kept
    return Traffic(_ring(world, ranks), _ring(within, sharding.secondary), _ring(steps * trainable, ranks))


def gathered(parameters: list[Parameter], sharding: Sharding, recompute: bool) -> tuple[int, int]:
    """(elements gathered in forward, in backward) of one micro-batch under ZeRO-3."""
    sizes = {p.name: sharding.shard(p.numel) * sharding.ranks for p in parameters if not sharding.persistent(p)}
    modules: dict[str, list[str]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.name.rpartition(".")[0], []).append(parameter.name)
    order = [(backward, modules[name]) for backward, name in visits(modules, recompute)]
    numel = {p.name: p.numel for p in parameters}
    here: set[str] = set()
    moved = [0, 0]
    for step, (backward, names) in enumerate(order):
        for name in names:
            if name in sizes and name not in here:
                moved[backward] += sizes[name]
                here.add(name)
        here -= set(names) - _soon(order[step + 1:], sharding.max_reuse, numel)
    return moved[0], moved[1]


def visits(modules: dict[str, list[str]], recompute: bool) -> Iterator[tuple[bool, str]]:
    """(in backward, module) in the order in which modules with parameters run; see Bagel, Layer and UnoObjective."""
    def of(prefix: str) -> list[str]:
        return [name for name in modules if name.startswith(prefix)]
    layers = sorted({int(name.split(".")[2]) for name in of("model.layers.")})
    forward: list[tuple[str, bool]] = [(name, False) for name in (*of("metaqueries"), *of("model.vit."), *of("model.connector"), *of("model.token_embedding"))]
    forward += [(name, True) for name in (*of("model.vae2llm"), *of("model.time_embedder"))]
    tail = [*of("model.norm"), "model.llm2vae", "model.lm_head", *of("regression")]
    last = layers[-1]
    for number in layers:
        forward += _layer(number, number < last)
    forward += [(name, True) for name in tail]
    for name, _ in forward:
        yield False, name
    for name in reversed(tail):
        yield True, name
    for number in reversed(layers):
        live = [name for name, alive in _layer(number, number < last) if alive]
        if recompute:
            yield from ((True, name) for name in live)
        yield from ((True, name) for name in reversed(live))
    for name in reversed([name for name, alive in forward if alive and not name.startswith(("model.layers", *tail))]):
        yield True, name


def _layer(number: int, finish_context: bool) -> list[tuple[str, bool]]:
    """(module, part of the graph) of one layer's forward."""
    und, gen = f"model.layers.{number}.und.", f"model.layers.{number}.gen."
    queries, keys, rest = ("q_proj", "q_norm"), ("k_proj", "k_norm", "v_proj"), ("o_proj", "post_norm", "gate_proj", "up_proj", "down_proj")
    context = [und + name for name in ("input_norm", *keys, *(queries if finish_context else ()))]
    live = [expert + name for expert in (und, gen) for name in ("input_norm", *queries, *keys)] + [expert + name for expert in (und, gen) for name in rest]
    after = [und + name for name in rest] if finish_context else []
    return [(name, False) for name in context] + [(name, True) for name in live] + [(name, False) for name in after]


def _soon(order: list[tuple[bool, list[str]]], distance: int, numel: dict[str, int]) -> set[str]:
    """Parameters of the next modules, up to `distance` elements."""
    soon: set[str] = set()
    traversed = 0
    for _, names in order:
        if traversed >= distance:
            break
        soon.update(names)
        traversed += sum(numel[name] for name in names)
    return soon


def _ring(data: int, ranks: int) -> int:
    return data * (ranks - 1) // ranks
