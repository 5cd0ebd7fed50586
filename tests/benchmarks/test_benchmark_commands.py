"""The commands of the benchmarks: scenarios, sweeps, traffic, utilisation, and one-line errors."""

import dataclasses
import os
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_case import PACK
from tiny import SPECIAL, recipe

from benchmarks import __main__ as command_line
from benchmarks.commands import overhead as overhead_command
from benchmarks.commands import scale as scale_command
from benchmarks.commands import sweep as sweep_command
from benchmarks.suite.attention import segment_table
from benchmarks.suite.packs import drawn_samples, settled
from benchmarks.suite.ranks import RanksFailed, start_ranks
from benchmarks.suite.scenarios import SCENARIOS, TINY_SCENARIO, read_scenarios
from uno_ds.cost.hardware import GPUS
from uno_ds.cost.scenario import Scenario
from uno_ds.cost.step_time import assumptions, step_time
from uno_ds.cost.traffic import Traffic
from uno_ds.cost.utilisation import Utilisation, sheet_rate
from uno_ds.settings import SettingsError

ROOT = Path(__file__).parents[2]


def test_the_readme_lists_the_scenarios_of_the_table():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    listed = {}
    for line in text.splitlines():
        found = re.match(r"\| ([A-Z]), [^|]*\|(.*)\|$", line)
        if found:
            cells = [int(cell.strip() or 0) for cell in found[2].split("|")]
            *of_sample, vit, clean, images, samples = cells
            listed[found[1]] = Scenario(*of_sample, samples, vit, clean, images=images)
    assert listed == SCENARIOS


def test_a_scenario_of_the_table_is_one_for_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A member is added to the table alone."""
    with pytest.raises(SettingsError, match="Q is unknown here; allowed are A, B, C, D, E, F"):
        read_scenarios("A,Q")
    assert command_line.main(["scale", "--ranks", "", "--rate", "1", "--scenario", "Q"]) == 2
    monkeypatch.setitem(SCENARIOS, "Q", PACK)
    assert read_scenarios("A,Q") == {"A": SCENARIOS["A"], "Q": PACK}
    assert scale_command._parse(["--scenario", "Q"]).scenario == "Q"
    assert command_line.main(["kernels", "--kernel", "plan", "--repeats", "1"]) == 0
    assert "\nQ: " in capsys.readouterr().out


def test_kernels_lay_out_the_latents_of_a_source_image_too():
    plain, edit = segment_table(PACK), segment_table(dataclasses.replace(PACK, clean=4))
    assert len(edit.length_S) == len(plain.length_S) + PACK.samples
    assert edit.length_S.sum() == plain.length_S.sum() + PACK.samples * (4 + 2)


def test_sweeps_reach_from_flow_matching_to_uno():
    points = list(sweep_command.points(TINY_SCENARIO, small=True))
    others = {sweep_command.SHARE, sweep_command.WINDOW, sweep_command.TASK}
    assert {choice for choice, _, _ in points} == {*sweep_command.TOKEN_CHOICES, *others}
    settings, samples = recipe(), drawn_samples(settled(recipe(), PACK), PACK, seed=0)
    for share in (0.0, 0.5, 1.0):
        kept = sweep_command.partly_supervised(samples, share, np.random.default_rng(0))
        assert sum(len(sample.segments) > 2 for sample in kept) == share * len(samples)
    ratios = [
        sweep_command.predicted_ratio(settings, settings.architecture, PACK, share)
        for share in (0.0, 0.5, 1.0)
    ]
    assert ratios[0] == 1 and ratios[1] == pytest.approx((1 + ratios[2]) / 2) and ratios[2] > 1
    draws = [settings.sequence, dataclasses.replace(settings.sequence, timestep_shift=4.0)]
    for sequence in draws:
        shifted = dataclasses.replace(settings, sequence=sequence)
        composer, rng = shifted.composer(None), np.random.default_rng(0)
        seen = np.mean([composer.draw_timestep(rng) <= 0.5 for _ in range(4000)])
        assert sweep_command.supervised_share(shifted, "window of t up to", 0.5) == pytest.approx(
            seen, abs=0.03
        )


def test_step_time_by_hand():
    """1e15 FLOP at 500 TFLOP/s: 2 s. 90 GB over 450 GB/s of which half is reached: 0.4 s; over two
    nodes of 2 with 50 GB/s each: 1.8 s."""
    gpu, sent = GPUS["H100-80GB"], Traffic(60 * 10**9, 0, 30 * 10**9)
    inside, across = (step_time(1e15, sent, gpu, gpus, 2, 500e12, 0.5) for gpus in (2, 4))
    assert (inside.computing, inside.sending, inside.hidden, inside.exposed) == pytest.approx(
        (2, 0.4, 2, 2.4)
    )
    assert across.sending == pytest.approx(1.8) and across.gpu_hours(900) == pytest.approx(
        (2.0, 3.8)
    )
    assert step_time(
        1e15, Traffic(0, 90 * 10**9, 0), gpu, 4, 2, 500e12, 0.5
    ).sending == pytest.approx(0.4)
    reported = " ".join(assumptions("H100-80GB", gpu, 8, 400e12, False, 0.8))
    assert (
        "not a measurement" in reported
        and "80%" in reported
        and "(measured)" in " ".join(assumptions("x", gpu, 8, 4e14, True, 0.8))
    )


def test_utilisation_has_no_peak_on_a_cpu_unless_the_recipe_names_one():
    settings = settled(recipe(), PACK)
    batch = settings.collator(SPECIAL)(drawn_samples(settings, PACK, seed=0))
    assert Utilisation(settings, torch.device("cpu"), False)([batch], 1.0) is None
    named = dataclasses.replace(
        settings, hardware=dataclasses.replace(settings.hardware, peak_flops=1e9)
    )
    once, twice = (
        Utilisation(named, torch.device("cpu"), False)([batch] * count, 1.0) for count in (1, 2)
    )
    assert 0 < once and twice == pytest.approx(2 * once)
    again = dataclasses.replace(named, model=dataclasses.replace(named.model, recompute=True))
    assert Utilisation(again, torch.device("cpu"), False)([batch], 1.0) == once


def test_only_boards_of_the_table_have_a_rate():
    known = {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA GeForce RTX 4090": 165e12,
    }
    assert {name: sheet_rate(name) for name in known} == known
    assert not any(
        map(
            sheet_rate,
            (
                "NVIDIA H100 PCIe",
                "NVIDIA H200 NVL",
                "NVIDIA GH200 480GB",
                "NVIDIA GeForce RTX 4090 D",
                "NVIDIA GeForce RTX 4090 Laptop GPU",
                "NVIDIA GeForce RTX 3090",
                "",
            ),
        )
    )


def test_the_limit_of_many_ranks_is_longer_where_few_were_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Two cores on which one rank takes 50 s."""
    now, limits = [0.0], {}

    def start(_: str, ranks: int, limit: float) -> list[dict[str, int]]:
        limits[ranks] = limit
        now[0] += 50 * max(1, ranks / 2)
        return [{"gather": 0, "reduce": 0}] * ranks

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(scale_command, "counted_traffic", start)
    monkeypatch.setattr(scale_command, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    assert scale_command.main(["--ranks", "1,2,4", "--seconds", "60"]) == 0
    assert limits == {1: 60, 2: 200, 4: 400}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "tiny", "--modes", "sideways"], "--modes: sideways is unknown"),
        (["--recipe", "tiny", "--stages", "x"], "--stages: x is unknown"),
        (["--recipe", "tiny", "--scenarios", "Z"], "--scenarios: Z is unknown"),
        (["--recipe", "tiny", "--random-weights"], "--random-weights: goes with"),
        (["--recipe", "bagel_7b_uno", "--scenarios", "A"], "--random-weights: is needed"),
        (["--recipe", "nothing"], "--recipe: 'nothing'"),
        (["--recipe", "tiny", "--layers", "x"], "--layers is a number"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture
):
    assert command_line.main(["overhead", *arguments]) == 2
    reported = capsys.readouterr().err.strip()
    assert reported.startswith("error: ") and words in reported and "\n" not in reported


def test_ranks_that_fail_or_take_too_long_are_a_sentence():
    with pytest.raises(RanksFailed, match=r"^ranks: rank 0 ended with code 2\.$"):
        start_ranks(["nothing"], 1)
    with pytest.raises(RanksFailed, match=r"^ranks: 1 rank\(s\) took longer than 0 s\.$"):
        start_ranks(["--help"], 1, limit=0)


def test_the_data_of_a_recipe_is_measured_though_its_folder_holds_a_run(tmp_path: Path):
    run = tmp_path / "tiny"
    (run / "checkpoints" / "step_3").mkdir(parents=True)
    (run / "checkpoints" / "step_3" / "manifest.json").write_text("{}")
    (run / "model").mkdir()
    overrides = [f"output={tmp_path}", f"data.folder={tmp_path / 'drawn'}", "data.scenes.rows=24"]
    flags = [word for override in overrides for word in ("--set", override)]
    recipe, opened = overhead_command.open_recipe(
        overhead_command.parse(["--recipe", "tiny", *flags])
    )
    assert opened is not None and recipe.folder == run
