"""Floating-point operations of one pack, forward and backward; a multiply-add counts 2.

Counted are the decoder layers and the language head on captions. Start and end tokens, visual
encoder, autoencoder and heads are left out, and the last layer counts as the others do. `naive`:
frozen weights, but the whole packed sequence is in the graph, and attention's backward does 7
matrix products per visible pair. `structured`: conditions are constants, and backward does 5
products for a pair whose query and key need a gradient, 3 if only the query does, 0 if it does not.

Shape suffixes: docs/notation.md.
"""

from dataclasses import dataclass

from uno_ds.cost.adapters import Adapters
from uno_ds.cost.scenario import Scenario, without_supervision
from uno_ds.cost.work import work_of
from uno_ds.kernels.plan import CONSTANT_KEY_PRODUCTS, LIVE_PRODUCTS
from uno_ds.model.architecture import Architecture
from uno_ds.sequence.segments import Kind

FORWARD_PRODUCTS, NAIVE_PRODUCTS = 2, 7


@dataclass(frozen=True)
class Flops:
    """FLOP of one pack without activation checkpointing."""

    flow_naive: int
    flow_structured: int
    uno_naive: int
    uno_structured: int


def flops(shape: Architecture, scenario: Scenario, adapters: Adapters | None = None) -> Flops:
    """The scenario with and without its captions and metaqueries, counted both ways. `adapters`:
    they train in place of the generation expert, whose weights then have no gradient."""
    flow = without_supervision(scenario)
    return Flops(
        flow_naive=_pack(shape, flow, adapters, structured=False),
        flow_structured=_pack(shape, flow, adapters, structured=True),
        uno_naive=_pack(shape, scenario, adapters, structured=False),
        uno_structured=_pack(shape, scenario, adapters, structured=True),
    )


def _pack(
    shape: Architecture, scenario: Scenario, adapters: Adapters | None, structured: bool
) -> int:
    query, key = shape.query_width, shape.key_width
    qkv = shape.hidden * (query + 2 * key)
    output = query * shape.hidden
    mlp = 3 * shape.hidden * shape.mlp
    flops_of_row = 2 * (qkv + output + mlp)
    # Forward, gradient of the input, and where weights train gradient of the weight. Constants have
    # no backward.
    row_passes = (
        (3 if adapters is None else 2) * scenario.generation
        + 2 * scenario.supervision
        + (1 if structured else 2) * scenario.context
    )

    work = work_of(shape, scenario)
    pairs_by_backward_products = {
        0: work.context_pairs,
        CONSTANT_KEY_PRODUCTS: work.constant_key_pairs,
        LIVE_PRODUCTS: work.live_pairs,
    }
    products = 0
    for backward_products, pairs in pairs_by_backward_products.items():
        backward = backward_products if structured else NAIVE_PRODUCTS
        products += pairs * (FORWARD_PRODUCTS + backward)
    flops_of_product = 2 * query

    layer = row_passes * flops_of_row + products * flops_of_product
    trained = 3 * 2 * adapters.products * scenario.generation if adapters is not None else 0
    head = 2 * 2 * shape.hidden * shape.vocabulary * scenario.rows(Kind.CAPTION)
    return shape.layers * layer + trained + head
