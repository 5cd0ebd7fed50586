"""The attention plan of a pack whose numbers of tokens are given."""

from typing import Any

import numpy as np

from uno_ds.cost.scenario import Scenario
from uno_ds.kernels.plan import AttentionPlan, build_plan
from uno_ds.sequence.segments import (
    LATENT_KINDS,
    SUPERVISION_KINDS,
    Kind,
    SegmentTable,
    parts_needing_gradient,
)

_IMAGE_KINDS = (*LATENT_KINDS, Kind.VIT)


def segment_table(scenario: Scenario) -> SegmentTable:
    """Samples of the scenario, with start and end tokens of images."""
    segments = scenario.segments
    kinds = [kind for kind, _ in segments]
    lengths = [tokens + 2 * (kind in _IMAGE_KINDS) for kind, tokens in segments]
    each, samples = len(kinds), scenario.samples
    supervises = []
    for place, kind in enumerate(kinds):
        reads = kind in SUPERVISION_KINDS
        before = kinds[: place + 1]
        supervises.append(place - before[::-1].index(Kind.NOISED) if reads else -1)
    starts = np.repeat(np.arange(samples) * each, each)
    of_all = np.tile(supervises, samples)
    return SegmentTable(
        np.tile(kinds, samples),
        np.tile(lengths, samples),
        np.repeat(np.arange(samples), each),
        np.where(of_all >= 0, starts + of_all, -1),
    )


def plan_arguments(table: SegmentTable) -> dict[str, Any]:
    """Arguments of build_plan for the rows in slab order, and `context`, the number of constant
    rows."""
    relation = table.relation()
    need, _ = parts_needing_gradient(
        table, relation, train_understanding=False, stop_at_context=True
    )
    length = table.length_S
    segment = np.repeat(np.arange(len(length)), length)
    first = np.cumsum(length) - length
    position = np.arange(len(segment)) - first[segment]
    latent_kind = np.isin(table.kind_S, LATENT_KINDS)[segment]
    boundary = (position == 0) | (position == length[segment] - 1)
    slab = np.where(latent_kind & ~boundary, 2, need[segment])
    order = np.argsort(slab, kind="stable")
    return dict(
        segment_T=segment[order],
        position_T=position[order],
        relation_SS=relation,
        group_S=table.sample_S,
        need_T=slab[order] > 0,
        context=int((slab == 0).sum()),
    )


def live_plan(scenario: Scenario) -> AttentionPlan:
    """The plan of the live rows, in which training spends nearly all of its attention."""
    arguments = plan_arguments(segment_table(scenario))
    context = arguments.pop("context")
    return build_plan(**arguments, query_rows=(context, len(arguments["segment_T"])))
