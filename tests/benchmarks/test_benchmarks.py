"""What benchmarks measure: modes share samples, steps and phases are complete, intervals hold."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from benchmark_case import PACK, compared, measured
from tiny import SPECIAL, SampleList, recipe

from benchmarks.suite.packs import (
    DEFAULT_MODES,
    SUPERVISION,
    as_mode,
    drawn_samples,
    images_of,
    settled,
)
from benchmarks.suite.statistic import ratio
from benchmarks.suite.timing import LiveTensors, Phases
from uno_ds.cost.scenario import Scenario
from uno_ds.sequence.segments import Kind
from uno_ds.settings import SettingsError


def test_modes_have_the_same_samples_and_noise_and_differ_in_supervision_only():
    settings = settled(recipe(), PACK)
    samples, collate = drawn_samples(settings, PACK, seed=1), settings.collator(SPECIAL)
    batches = {mode: collate(as_mode(samples, mode)) for mode in SUPERVISION}
    for mode, batch in batches.items():
        torch.testing.assert_close(
            batch.latents.noise_XC, batches["uno"].latents.noise_XC, rtol=0, atol=0
        )
        torch.testing.assert_close(
            batch.latents.timestep_G, batches["uno"].latents.timestep_G, rtol=0, atol=0
        )
        assert (len(batch.captions.rows_Y) > 0) == (Kind.CAPTION in SUPERVISION[mode]) and (
            len(batch.metaqueries.index_M) > 0
        ) == (Kind.METAQUERY in SUPERVISION[mode])
        assert batch.vision.lengths == (
            batches["uno"].vision.lengths if Kind.METAQUERY in SUPERVISION[mode] else ()
        )
        assert images_of(as_mode(samples, mode)) == PACK.samples
    # Two boundary tokens an image; prompt and caption count their own.
    assert (
        batches["uno"].tokens == PACK.tokens + 2 * PACK.samples
        and batches["flow"].context == PACK.context
    )


@pytest.mark.parametrize("mode", SUPERVISION)
def test_supervision_of_every_image_of_an_interleaved_sample_still_reads_its_image(mode):
    make = SampleList(recipe())
    (sample,) = as_mode([make.interleaved(1)], mode)
    kinds = [segment.kind for segment in sample.segments]
    assert kinds.count(Kind.NOISED) == 2
    last_noised = max(place for place, kind in enumerate(kinds) if kind == Kind.NOISED)
    for place, segment in enumerate(sample.segments):
        if segment.kind in (Kind.CAPTION, Kind.METAQUERY):
            assert segment.kind in SUPERVISION[mode]
            noised = last_noised if place > last_noised else kinds.index(Kind.NOISED)
            assert segment.supervises == noised


def test_drawn_packs_hold_the_scenario_that_was_asked_for():
    edit = Scenario(prompt=7, latents=49, caption=9, metaqueries=9, samples=2, vit=6, clean=25)
    settings = settled(recipe(), edit)
    batch = settings.collator(SPECIAL)(drawn_samples(settings, edit, seed=0))
    assert (
        len(batch.latents.noised_X) == 2 * 49
        and batch.generation == 2 * (49 + 25)
        and batch.vision.context_rows == 2 * 6
        and len(batch.metaqueries.index_M) == 2 * 9
    )
    assert len(batch.captions.rows_Y) == 2 * (9 - 1)
    given = settings.collator(SPECIAL)(drawn_samples(settings, edit, seed=0, encoded=True))
    assert (
        all(given.latents.encoded)
        and not any(batch.latents.encoded)
        and given.tokens == batch.tokens
    )
    with pytest.raises(SettingsError, match="no square grid"):
        settled(recipe(), dataclasses.replace(edit, metaqueries=5))


def test_a_measurement_has_every_step_and_phase_and_counts_what_was_predicted():
    entry = measured()
    assert (
        set(entry["modes"]) == set(DEFAULT_MODES)
        and not entry["failed_modes"]
        and entry["peak_flops"] is None
    )
    for mode, numbers in entry["modes"].items():
        assert (
            len(numbers["step_seconds"])
            == len(numbers["cpu_seconds"])
            == len(numbers["tokens"])
            == 4
            and min(numbers["step_seconds"]) > 0
        )
        assert {name for name, times in numbers["phases"].items() if times and sum(times) > 0} >= {
            "data",
            "visual encoder",
            "forward",
            "backward",
        }
        assert numbers["phases"]["communication"] is None and numbers["mfu"] is None
        assert numbers["flops"]["unexplained"] == 0, mode
        assert numbers["peak_memory_bytes"] > 0
    assert (
        entry["ratios"]["uno / flow"]["predicted"]
        > 1
        > entry["ratios"]["uno / naive uno"]["predicted"]
    )
    assert (
        entry["modes"]["naive uno"]["peak_memory_bytes"]
        > entry["modes"]["flow"]["peak_memory_bytes"]
    )


def test_two_measurements_agree_within_the_intervals_that_they_state():
    """Of three pairs at least one: a 95 % interval misses now and then, and a busy machine makes it
    miss more often."""

    def agree() -> bool:
        found = [
            compared(["flow", "uno"], rounds=25).plain()["ratios"]["uno / flow"] for _ in range(2)
        ]
        assert all(one["low"] <= one["median"] <= one["high"] for one in found)
        return max(one["low"] for one in found) <= min(one["high"] for one in found)

    assert any(agree() for _ in range(3))


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says_and_drift_cancels():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        drift = np.linspace(1, 3, 15)
        found = ratio(
            (drift * rng.normal(1.2, 0.03, 15)).tolist(),
            (drift * rng.normal(1.0, 0.03, 15)).tolist(),
        )
        held += found["low"] <= 1.2 <= found["high"]
    assert 0.9 <= held / 200 <= 1.0
    assert ratio([2.0, 2.0], [1.0, 1.0]) == {
        "median": 2.0,
        "low": None,
        "high": None,
        "level": 0.95,
        "of_totals": 2.0,
        "pairs": 2,
    }


def test_live_tensors_counts_each_storage_once_and_forgets_what_has_gone():
    with LiveTensors() as tensors:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        c = (a + 1).sum()
        assert tensors.peak - tensors.held >= 8000
        held = tensors.live
        del a, b
        assert held - tensors.live == 4000 and c == 1000


def test_a_phase_within_a_phase_is_not_counted_twice():
    # Processor time, which a busy machine does not stretch.
    phases = Phases(torch.device("cpu"), clock=time.process_time)
    inner = phases.around("inner", lambda: sum(range(300_000)))
    phases.around("outer", lambda: inner())()
    assert phases.seconds["inner"] > 5 * phases.seconds["outer"] > 0
