"""A scenario of several generated images, each the source of the next: its rows and visible pairs
are those of the segment table and of the packs that are drawn for it."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import SPECIAL, counts_of, recipe

from benchmarks.suite.counting import counted_flops
from benchmarks.suite.models import build_objective
from benchmarks.suite.packs import as_mode, drawn_samples, images_of, settled
from benchmarks.suite.scenarios import SCENARIOS
from uno_ds.cost.flops import flops
from uno_ds.cost.scenario import Scenario, read_scenario
from uno_ds.cost.scenario_plan import live_plan, segment_table
from uno_ds.cost.step_flops import attention_flops, step_flops, total
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import Work, work_of
from uno_ds.kernels.plan import CAUSAL, FULL
from uno_ds.sequence.segments import Kind, SegmentTable
from uno_ds.settings import SettingsError

PACK = Scenario(
    prompt=7, latents=16, caption=9, metaqueries=4, samples=2, vit=6, clean=9, target=8, images=3
)
CONSTANT = (Kind.TEXT, Kind.VIT)
CASES = [
    PACK,
    dataclasses.replace(PACK, images=1),
    dataclasses.replace(PACK, vit=0),
    dataclasses.replace(PACK, clean=0, caption=0),
    dataclasses.replace(PACK, vit=0, clean=0, metaqueries=0),
]


def pairs_of(scenario: Scenario) -> dict[str, int]:
    """Of the pack, by the relation of the segment table of its segments without start and end
    tokens."""
    with_ends = segment_table(scenario)
    tokens = [count for _, count in scenario.segments] * scenario.samples
    table = SegmentTable(
        with_ends.kind_S, np.array(tokens), with_ends.sample_S, with_ends.supervises_S
    )
    found = {"context": 0, "live": 0, "constant keys": 0}
    for (query, key), relation in np.ndenumerate(table.relation()):
        assert relation in (0, FULL, CAUSAL)
        count = tokens[query] * tokens[key]
        if relation == CAUSAL:
            count = tokens[query] * (tokens[query] + 1) // 2
        if not relation:
            continue
        if table.kind_S[query] in CONSTANT:
            found["context"] += count
        else:
            found["constant keys" if table.kind_S[key] in CONSTANT else "live"] += count
    return found


@pytest.mark.parametrize("scenario", CASES, ids=str)
def test_pairs_and_rows_are_those_of_the_segment_table(scenario: Scenario):
    shape = recipe().architecture
    work, expected = work_of(shape, scenario), pairs_of(scenario)
    assert expected == {
        "context": work.context_pairs,
        "live": work.live_pairs,
        "constant keys": work.constant_key_pairs,
    }
    assert work.rows == scenario.tokens
    # Two more tokens for each image, on either side of its patches.
    images = scenario.samples * sum(
        kind in (Kind.VIT, Kind.CLEAN, Kind.NOISED) for kind, _ in scenario.segments
    )
    table = segment_table(scenario)
    assert table.length_S.sum() == scenario.tokens + 2 * images
    # Those of noised images need a gradient.
    constant = scenario.context + 2 * (images - scenario.samples * scenario.images)
    assert live_plan(scenario).query_rows == (constant, int(table.length_S.sum()))


@pytest.mark.parametrize("scenario", CASES, ids=str)
def test_drawn_packs_hold_the_images_of_the_scenario_in_turn(scenario: Scenario):
    settings = settled(recipe(), scenario)
    samples = drawn_samples(settings, scenario, seed=0)
    work = work_of(settings.architecture, scenario)
    batch = settings.collator(SPECIAL)(samples)
    found = Work.of(batch)
    same = ("generation", "condition_patches", "noised", "captions", "metaqueries")
    for name in same:
        assert getattr(found, name) == getattr(work, name), name
    assert len(found.encoded_pixels) == len(work.encoded_pixels)
    assert images_of(samples) == scenario.samples * scenario.images
    kinds = [segment.kind for segment in samples[0].segments]
    assert kinds == [kind for kind, _ in scenario.segments]


@pytest.mark.parametrize("mode", ["flow", "uno"])
def test_operations_of_a_drawn_pack_are_those_that_torch_counts(mode: str):
    settings = settled(recipe(), PACK)
    samples = as_mode(drawn_samples(settings, PACK, seed=0), mode)
    batch = settings.collator(SPECIAL)(samples)
    objective = build_objective(settings, torch.device("cpu"), torch.float32, random=True)

    def step() -> None:
        loss, _ = objective(batch, counts_of([batch]))
        loss.backward()

    work, plan = Work.of(batch), plan_of(settings, read_answers=False)
    parts = step_flops(settings.architecture, work, plan)
    attention = attention_flops(parts, settings.architecture, work, plan).total
    assert counted_flops(step) + attention == total(parts).total


def test_the_scenario_of_the_table_fills_a_pack_and_can_be_given():
    given = "prompt=60,latents=1024,caption=200,metaqueries=256,samples=3,vit=1024,clean=1024"
    assert read_scenario(f"{given},images=3") == SCENARIOS["G"]
    assert 30_000 < SCENARIOS["G"].tokens <= 32_768
    with pytest.raises(SettingsError, match="--scenario: needs at least one sample with one image"):
        read_scenario(f"{given},images=0")
    count = flops(recipe().architecture, SCENARIOS["G"])
    single = flops(recipe().architecture, dataclasses.replace(SCENARIOS["G"], images=1))
    # Later images read the earlier ones: more than three times the operations of one.
    assert count.uno_structured > 3 * single.uno_structured
