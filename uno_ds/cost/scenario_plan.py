"""The attention plan of a pack whose numbers of tokens are given."""

from typing import Any

import numpy as np

from uno_ds.cost.scenario import Scenario
from uno_ds.kernels.plan import AttentionPlan, build_plan
from uno_ds.sequence.segments import LATENT_KINDS, Kind, SegmentTable, parts_needing_gradient


def segment_table(scenario: Scenario) -> SegmentTable:
    """Samples of [image to edit, in the visual encoder and as latents], prompt, noised image,
    caption, metaqueries, negative caption."""
    kinds = [Kind.TEXT, Kind.NOISED, Kind.CAPTION, Kind.METAQUERY]
    lengths = [scenario.prompt, scenario.latents + 2, scenario.caption, scenario.metaqueries]
    if scenario.negative:
        kinds.append(Kind.CAPTION)
        lengths.append(scenario.negative)
    if scenario.clean:
        kinds.insert(0, Kind.CLEAN)
        lengths.insert(0, scenario.clean + 2)
    if scenario.vit:
        kinds.insert(0, Kind.VIT)
        lengths.insert(0, scenario.vit + 2)
    samples = scenario.samples
    each = len(kinds)
    reads = np.isin(kinds, (Kind.CAPTION, Kind.METAQUERY))
    noised = np.arange(samples) * each + kinds.index(Kind.NOISED)
    supervises = np.where(np.tile(reads, samples), np.repeat(noised, each), -1)
    return SegmentTable(
        np.tile(kinds, samples),
        np.tile(lengths, samples),
        np.repeat(np.arange(samples), each),
        supervises,
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
