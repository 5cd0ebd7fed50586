"""The benchmark of reading images writes what it measured of every number of workers."""

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import reading
from benchmarks.suite.results import read_result


@pytest.mark.parametrize(
    "kinds", [("threads",), pytest.param(("threads", "processes"), marks=pytest.mark.slow)]
)
def test_every_size_kind_and_number_of_workers_has_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...]
):
    monkeypatch.setattr(reading, "SIZES", ((512, 512), (600, 512)))
    monkeypatch.setattr(reading, "KINDS", kinds)
    path = tmp_path / "reading.json"
    flags = ["--workers", "1,2", "--images", "3", "--rounds", "2", "--json", str(path)]
    assert main(["reading", *flags]) == 0
    found = read_result(path)
    assert found["kind"] == "reading" and found["complete"]
    names = [
        f"{size}, {workers} {kind}"
        for size in ("512x512", "600x512")
        for kind in kinds
        for workers in (1, 2)
    ]
    assert [entry["name"] for entry in found["measurements"]] == names
    for entry in found["measurements"]:
        rates = [one["images_per_second"] for one in entry["rounds"]]
        assert len(rates) == 2 and min(rates) <= entry["images_per_second"] <= max(rates)
        assert entry["pack_seconds"] == pytest.approx(6 / entry["images_per_second"])


def test_numbers_of_workers_that_are_none_are_one_line(capsys: pytest.CaptureFixture):
    assert main(["reading", "--workers", "1,x"]) == 2
    assert "--workers: expects numbers from 1 to 64 separated by commas." in capsys.readouterr().err
