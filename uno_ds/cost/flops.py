"""Floating-point operations of one pack, forward and backward; a multiply-add counts 2.

Counted are the decoder layers and the language head on captions; start and end tokens, visual
encoder, autoencoder and heads are not, and the last layer counts as the others do. `naive`: frozen
weights, but the whole packed sequence is in the graph, and attention's backward does 7 matrix
products per visible pair. `structured`: conditions are constants, and backward does 5 products for
a pair whose query and key need a gradient, 3 if only the query does, 0 if it does not.

Shape suffixes: docs/notation.md.
"""

from dataclasses import dataclass, replace

from uno_ds.cost.scenario import Scenario
from uno_ds.model.architecture import Architecture

FORWARD_PRODUCTS, NAIVE_PRODUCTS, LIVE_PRODUCTS, CONSTANT_KEY_PRODUCTS = 2, 7, 5, 3


@dataclass(frozen=True)
class Flops:
    """FLOP of one pack without activation checkpointing."""

    flow_naive: int
    flow_structured: int
    uno_naive: int
    uno_structured: int


def flops(shape: Architecture, scenario: Scenario) -> Flops:
    """The scenario with and without its captions and metaqueries, counted both ways."""
    flow = replace(scenario, caption=0, metaqueries=0, target=0)
    return Flops(
        *(_pack(shape, one, structured) for one in (flow, scenario) for structured in (False, True))
    )


def _pack(shape: Architecture, scenario: Scenario, structured: bool) -> int:
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    token = 2 * (
        shape.hidden * (query + 2 * key) + query * shape.hidden + 3 * shape.hidden * shape.mlp
    )
    context, supervision, generation = (
        count // scenario.samples
        for count in (scenario.context, scenario.supervision, scenario.generation)
    )
    # A weight gradient only where weights train; no backward at all for constants.
    passes = 3 * generation + 2 * supervision + (1 if structured else 2) * context
    pairs = _pairs(scenario)
    products = sum(
        count * (FORWARD_PRODUCTS + (backward if structured else NAIVE_PRODUCTS))
        for backward, count in pairs.items()
    )
    head = 2 * 2 * shape.hidden * shape.vocabulary * scenario.caption
    return scenario.samples * (shape.layers * (passes * token + products * 2 * query) + head)


def _pairs(scenario: Scenario) -> dict[int, int]:
    """{products of a structured backward: visible (query, key) pairs of one sample}."""
    prompt, vit, clean, latents = scenario.prompt, scenario.vit, scenario.clean, scenario.latents
    caption, queries = scenario.caption, scenario.metaqueries
    constant = prompt * (prompt + 1) // 2 + vit**2 + prompt * vit + (prompt + vit) * clean
    live = (
        latents**2
        + clean**2
        + latents * clean
        + caption * (caption + 1) // 2
        + queries**2
        + (caption + queries) * latents
    )
    return {0: constant, CONSTANT_KEY_PRODUCTS: latents * (prompt + vit), LIVE_PRODUCTS: live}
