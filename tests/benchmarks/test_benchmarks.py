"""The benchmark suite: modes share samples, result files hold to their schema, ratios to their interval, and the report shows it all."""

import base64
import copy
import dataclasses
import html.parser
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SPECIAL, recipe

from benchmarks.commands import overhead as overhead_command
from benchmarks.commands import report as report_command
from benchmarks.commands import scale as scale_command
from benchmarks.commands import suite as suite_command
from benchmarks.commands import sweep as sweep_command
from benchmarks.suite.measure import Comparison, GraphStage, run_rounds
from benchmarks.suite.models import build_objective
from benchmarks.suite.packs import SUPERVISION, as_mode, drawn_samples, images_of, settled
from benchmarks.suite.results import new_result, read_result, validate, write_result
from benchmarks.suite.statistic import ratio
from benchmarks.suite.timing import LiveTensors, Phases
from uno_ds.cost.hardware import GPUS
from uno_ds.cost.scenario import Scenario
from uno_ds.cost.step_time import assumptions, step_time
from uno_ds.cost.traffic import Traffic
from uno_ds.cost.utilisation import Utilisation, sheet_rate
from uno_ds.sequence.segments import Kind
from uno_ds.settings import SettingsError

ROOT = Path(__file__).parents[2]
PACK = Scenario(prompt=12, latents=36, caption=14, metaqueries=4, samples=4)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def compared(modes: list[str], rounds: int, splits: int = 0) -> Comparison:
    settings = settled(recipe(), PACK)
    stage = GraphStage(
        settings,
        build_objective(settings, torch.device("cpu"), torch.float32, random=True),
        torch.device("cpu"),
    )
    packs = itertools.cycle([drawn_samples(settings, PACK, seed) for seed in range(2)])
    comparison = Comparison(stage, modes, packs, 1, settings.collator(SPECIAL), read_answers=False)
    comparison.prepare(warmup=1)
    run_rounds(comparison, rounds, splits, math.inf, lambda: None)
    return comparison


@pytest.fixture(scope="module")
def entry() -> dict[str, Any]:
    """A measurement of every mode on a small model."""
    return {
        "name": "small",
        "stage": "graph",
        "skipped": None,
        "device": "cpu",
        "precision": "fp32",
        "ranks": 1,
        "layers": 2,
        "weights": "random",
        **compared(list(SUPERVISION), rounds=4, splits=2).plain(),
    }


@pytest.fixture
def result(entry: dict[str, Any]) -> dict[str, Any]:
    return new_result("overhead", {"name": "small"}) | {
        "measurements": [copy.deepcopy(entry)],
        "unknown": [overhead_command.CPU_RATIOS],
    }


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


def test_a_measurement_has_every_step_and_phase_and_counts_what_was_predicted(
    entry: dict[str, Any],
):
    assert (
        set(entry["modes"]) == set(SUPERVISION)
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
    """Of three pairs at least one: a 95 % interval misses now and then, and a busy machine makes it miss more often."""

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


def test_result_files_are_validated_on_writing_and_on_reading(
    result: dict[str, Any], tmp_path: Path
):
    path = tmp_path / "deep" / "result.json"
    write_result(path, result)
    assert (
        not read_result(path)["complete"]
        and read_result(path)["load"]["end"] is not None
        and not list(path.parent.glob("*.part"))
    )
    write_result(path, result, complete=True)
    assert read_result(path) == json.loads(json.dumps(result))
    for break_it, words in (
        (lambda r: r.pop("commit"), "lacks commit"),
        (lambda r: r["hardware"].pop("gpus"), "hardware lacks gpus"),
        (lambda r: r["measurements"][0].pop("stage"), "lacks stage"),
        (lambda r: r.update(kind="other"), "kind must be one of"),
        (
            lambda r: r["measurements"][0]["modes"]["uno"].update(step_seconds=["1"]),
            r"step_seconds\[0\] must be of type number",
        ),
        (
            lambda r: r["measurements"][0]["ratios"]["uno / flow"].pop("predicted"),
            "lacks predicted",
        ),
    ):
        broken = copy.deepcopy(result)
        break_it(broken)
        with pytest.raises(ValueError, match=words):
            write_result(path, broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(SettingsError, match=f"result.json: .*{words}"):
            read_result(path)
    path.write_text("{")
    with pytest.raises(SettingsError, match="not readable JSON"):
        read_result(path)


def test_committed_results_hold_to_the_schema():
    files = [path for path in (ROOT / "benchmarks" / "results").glob("*/*.json")]
    for path in files:
        assert not validate(json.loads(path.read_text())), path


class Page(html.parser.HTMLParser):
    """What a browser would load, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.outside, self.words, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attributes:
            if tag == "img" and name == "src":
                self.images.append(value)
            elif name in ("src", "href", "srcset", "action") or tag == "script":
                self.outside.append((tag, name, value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def made_report(
    folder: Path, result: dict[str, Any], *flags: str, against: dict[str, Any] | None = None
) -> tuple[Page, str]:
    write_result(folder / "result.json", result, complete=True)
    if against:
        write_result(folder / "other.json", against, complete=True)
        flags = (*flags, "--against", str(folder / "other.json"))
    assert (
        report_command.main([str(folder / "result.json"), "--out", str(folder / "page"), *flags])
        == 0
    )
    return Page((folder / "page" / "report.html").read_text()), (
        folder / "page" / "report.md"
    ).read_text()


def test_the_report_is_one_page_with_every_figure_in_it_and_nothing_from_outside(
    result: dict[str, Any], tmp_path: Path
):
    page, markdown = made_report(tmp_path, result)
    assert len(page.images) == 3 and not page.outside and not page.open
    for image in page.images:
        kind, _, data = image.partition(",")
        assert (
            kind == "data:image/png;base64"
            and base64.b64decode(data, validate=True).startswith(b"\x89PNG")
            and len(data) > 5000
        )
    text = " ".join(page.words)
    found = result["measurements"][0]["ratios"]["uno / flow"]
    assert f"uno / flow: {found['median']:.3f}" in text and overhead_command.CPU_RATIOS in text
    assert (
        all(mode in text for mode in SUPERVISION)
        and "visual encoder, targets" in text
        and "TFLOP" not in text
    )
    assert all(
        (tmp_path / "page" / f"figures/{number}.png").exists()
        and f"](figures/{number}.png)" in markdown
        for number in (1, 2, 3)
    )


def test_the_report_marks_a_regression_beyond_the_noise_and_no_other(
    result: dict[str, Any], tmp_path: Path
):
    for numbers in result["measurements"][0]["modes"].values():
        for clock in ("step_seconds", "cpu_seconds"):
            numbers[clock] = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98]
    before = copy.deepcopy(result)
    slow = result["measurements"][0]["modes"]["uno"]
    slow["step_seconds"], slow["cpu_seconds"] = (
        [1.2 * time for time in slow[clock]] for clock in ("step_seconds", "cpu_seconds")
    )
    page, _ = made_report(tmp_path, result, against=before)
    told = [words for words in page.words if words.startswith("Regression: ")]
    assert len(told) == 1 and "small, graph, cpu, uno is +20.0%" in told[0]
    page, _ = made_report(tmp_path, before, against=before)
    assert (
        not [words for words in page.words if words.startswith("Regression: ")]
        and "No regression beyond the noise." in page.words
    )


def test_hours_energy_and_money_are_told_of_gpus_only_and_by_the_users_prices(
    result: dict[str, Any], tmp_path: Path
):
    page, _ = made_report(tmp_path, result, "--price", "2", "--gpu", "H200-141GB")
    assert "GPU hours" not in page.words
    entry = result["measurements"][0]
    entry |= {
        "device": "a device",
        "modes": {"uno": {**entry["modes"]["uno"], "step_seconds": [3.6]}},
        "clock": "step_seconds",
    }
    entry["ratios"] = {}
    page, _ = made_report(
        tmp_path,
        result,
        "--price",
        "2",
        "--electricity",
        "0.5",
        "--gpus",
        "10",
        "--steps",
        "1000",
        "--watts",
        "500",
    )
    words = page.words
    place = next(number for number, word in enumerate(words) if word == "small, graph")
    # 3.6 s * 1,000 steps * 10 GPUs = 10 hours, 5 kWh, 20 + 2.5 of money.
    assert words[place + 1 : place + 5] == ["uno", "10", "5", "22"]


@pytest.mark.skipif(
    not any(map(shutil.which, BROWSERS)),
    reason="no headless browser is installed; the page is read by a parser above",
)
def test_a_browser_renders_the_report(result: dict[str, Any], tmp_path: Path):
    made_report(tmp_path, result)
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    shot = tmp_path / "page.png"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--screenshot={shot}",
        "--window-size=1100,3000",
        f"file://{tmp_path / 'page' / 'report.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert ":CONSOLE" not in done.stderr and shot.stat().st_size > 20_000


def test_sweeps_reach_from_flow_matching_to_uno():
    points = list(sweep_command.points(sweep_command.SMALL, small=True))
    assert {knob for knob, _, _ in points} == {
        "metaqueries",
        "caption tokens",
        "latent tokens",
        "supervised share",
        "window of t up to",
        "task",
    }
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
        layout, rng = shifted.layout(None), np.random.default_rng(0)
        seen = np.mean([layout.draw_timestep(rng) <= 0.5 for _ in range(4000)])
        assert sweep_command.supervised_share(shifted, "window of t up to", 0.5) == pytest.approx(
            seen, abs=0.03
        )


def test_step_time_by_hand():
    """1e15 FLOP at 500 TFLOP/s: 2 s. 90 GB over 450 GB/s of which half is reached: 0.4 s; over two nodes of 2 with 50 GB/s each: 1.8 s."""
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
    told = " ".join(assumptions("H100-80GB", gpu, 8, 400e12, False, 0.8))
    assert (
        "not a measurement" in told
        and "80%" in told
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
    }
    assert {name: sheet_rate(name) for name in known} == known
    assert not any(
        map(
            sheet_rate,
            (
                "NVIDIA H100 PCIe",
                "NVIDIA H200 NVL",
                "NVIDIA GH200 480GB",
                "NVIDIA GeForce RTX 4090",
                "",
            ),
        )
    )


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


def test_the_suite_on_a_gpu_stays_within_its_time_and_says_no_without_one(
    capsys: pytest.CaptureFixture,
):
    for quick, minutes in ((False, 9), (True, 3)):
        parts = suite_command.gpu_parts(quick)
        assert sum(part.seconds for part in parts) <= minutes * 60 - 20 and any(
            "gpu" in part.command for part in parts
        )
        for part in parts:
            if "overhead" in part.command and "fit" not in part.command:
                options = overhead_command.parse(part.command[part.command.index("overhead") + 1 :])
                assert (
                    options.random_weights
                    and set(options.modes) >= {"flow", "uno"}
                    and options.seconds < part.seconds
                )
    if not torch.cuda.is_available():
        assert suite_command.main(["gpu"]) == 2 and "make bench" in capsys.readouterr().err


@pytest.mark.parametrize("slower", [1, 8])
def test_limits_of_the_suite_follow_the_measured_speed_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, slower: int
):
    """On two cores. What a part needs beyond the time that it measures for grows with the probe, and so does its limit."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    parts = {part.title: part for part in suite_command.cpu_parts(False, 3.0 * slower)}
    measured = {"sweeps": 35, "overhead, whole step": 45, "overhead, forward and backward": 45}
    for title, seconds in measured.items():
        assert float(parts[title].command[parts[title].command.index("--seconds") + 1]) == seconds
        assert parts[title].seconds - seconds == pytest.approx(60 * slower)
    communication = parts["communication"]
    each = float(communication.command[communication.command.index("--seconds") + 1])
    # Four ranks take turns on two cores.
    assert each == 60 * slower and communication.seconds > (1 + 1 + 2) * each


def test_the_suite_measures_the_machine_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(suite_command, "PROBE", "import time; time.sleep(1.5)")
    given = []
    monkeypatch.setattr(suite_command, "run_part", lambda part, _: given.append(part.seconds))
    assert suite_command.main(["cpu", "--quick", "--out", str(tmp_path)]) == 0
    assert min(given) >= 45 + 1.5 * suite_command.PROBES


def test_the_limit_of_many_ranks_is_longer_where_few_were_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Two cores on which one rank takes 50 s."""
    now, limits = [0.0], {}

    def start(_, ranks: int, limit: float) -> list[dict[str, int]]:
        limits[ranks] = limit
        now[0] += 50 * max(1, ranks / 2)
        return [{"gather": 0, "reduce": 0}] * ranks

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(scale_command, "start_ranks", start)
    monkeypatch.setattr(scale_command, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    assert scale_command.main(["--ranks", "1,2,4", "--seconds", "60"]) == 0
    assert limits == {1: 60, 2: 200, 4: 400}


def test_a_part_that_fails_or_is_cut_is_told_and_keeps_its_file(tmp_path: Path):
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import sys, time, pathlib"], check=True)
    # Long enough for a start, also on a machine that is busier in a moment.
    limit = 1 + 10 * (time.monotonic() - began)
    script = "import sys, time, pathlib; pathlib.Path(sys.argv[2]).write_text('kept'); {}"
    cut = suite_command.Part(
        "cut", [sys.executable, "-c", script.format("time.sleep(600)")], limit, "cut.json"
    )
    failed = suite_command.Part(
        "failed", [sys.executable, "-c", script.format("sys.exit(3)")], 100, "failed.json"
    )
    assert (
        f"cut after {limit:.0f} s" in suite_command.run_part(cut, tmp_path)
        and suite_command.run_part(failed, tmp_path) == "ended with code 3"
    )
    assert (tmp_path / "cut.json").read_text() == (tmp_path / "failed.json").read_text() == "kept"


def test_kernel_results_get_the_envelope_of_a_result(tmp_path: Path):
    row = {
        "scenario": "A",
        "backend": "sdpa",
        "forward": {"ms": {"20": 1.0, "50": 2.0, "80": 3.0}, "tflops": 4.0},
    }
    (tmp_path / "raw.json").write_text(
        json.dumps({"command": "kernels.py", "kernel": "conditioning_attention", "rows": [row]})
    )
    suite_command.envelop("conditioning_attention", tmp_path / "raw.json", tmp_path / "kernel.json")
    result = read_result(tmp_path / "kernel.json")
    assert (
        result["measurements"] == [{"name": "conditioning_attention", **row}]
        and not (tmp_path / "raw.json").exists()
    )
    page, _ = made_report(tmp_path, result)
    assert "useful TFLOP/s" in page.words and "2.000" in page.words


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
    assert overhead_command.main(arguments) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ") and words in told and "\n" not in told


def test_modelled_gpus_come_with_their_assumptions(capsys: pytest.CaptureFixture, tmp_path: Path):
    assert (
        scale_command.main(["--ranks", "", "--rate", "1", "--json", str(tmp_path / "scale.json")])
        == 0
    )
    entries = read_result(tmp_path / "scale.json")["measurements"]
    assert [entry["gpus"] for entry in entries] == [8, 64, 512, 1024]
    assert all("an assumption, not a measurement" in entry["assumptions"][0] for entry in entries)
    assert (
        entries[0]["gpu_hours"][0]
        == pytest.approx(entries[0]["computing_seconds"] * 5000 * 8 / 3600)
        and "modelled" in capsys.readouterr().out
    )
    page, _ = made_report(tmp_path, read_result(tmp_path / "scale.json"))
    assert len(page.images) == 1 and any("Not measured." in words for words in page.words)
