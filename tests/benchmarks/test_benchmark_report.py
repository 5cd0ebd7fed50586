"""The report: one page with every figure, marks of regressions, hours and money."""

import base64
import copy
import html.parser
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from benchmark_case import overhead_result

from benchmarks.commands import report as report_command
from benchmarks.commands import scale as scale_command
from benchmarks.suite.limits import CPU_RATIOS
from benchmarks.suite.packs import SUPERVISION
from benchmarks.suite.results import new_result, read_result, write_result

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture
def result() -> dict[str, Any]:
    return overhead_result()


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
    assert f"uno / flow: {found['median']:.3f}" in text and CPU_RATIOS in text
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
    reported = [words for words in page.words if words.startswith("Regression: ")]
    assert len(reported) == 1 and "small, graph, cpu, uno is +20.0%" in reported[0]
    page, _ = made_report(tmp_path, before, against=before)
    assert (
        not [words for words in page.words if words.startswith("Regression: ")]
        and "No regression beyond the noise." in page.words
    )


def test_hours_energy_and_money_are_reported_of_gpus_only_and_by_the_users_prices(
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


def test_times_of_kernels_are_a_table_of_the_report(tmp_path: Path):
    milliseconds = {"20": 1.0, "50": 2.0, "80": 3.0}
    row = {
        "name": "conditioning_attention",
        "scenario": "A",
        "backend": "sdpa",
        "forward": {"ms": milliseconds, "tflops": 4.0},
    }
    result = new_result("kernels")
    result["measurements"] = [row]
    page, _ = made_report(tmp_path, result)
    assert "useful TFLOP/s" in page.words and "2.000" in page.words


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
