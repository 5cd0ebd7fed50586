"""Traces of whole runs: the steps and ranks that were asked for, with every named range, and
nothing else of the run changed by them."""

import json
import time
from pathlib import Path

import pytest
from metric_runs import REPEATED
from ranks import ForkServer
from runs import STEPS, Place, curve

from uno_ds.commands import trace_summary
from uno_ds.ranges import Range
from uno_ds.training.trace_reading import Trace, kind_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Place:
    return Place(tmp_path_factory.mktemp("traced"), server)


@pytest.fixture(scope="module")
def traced(place: Place) -> list[Path]:
    """The trace files of a run with steps 3 and 4 of rank 1 traced."""
    place.run("traced", logging={"trace": {"steps": [3, 4], "ranks": [1]}})
    return sorted((place.of("traced") / "traces").iterdir())


def test_the_steps_of_the_recipe_are_traced_with_every_range(place: Place, traced: list[Path]):
    assert [path.name for path in traced] == ["step_3-4_rank1.json.gz"]
    trace = Trace(traced[0])
    assert [step.name for step in trace.steps] == ["ProfilerStep#3", "ProfilerStep#4"]
    assert trace.rank == 1 and not trace.on_gpu
    rows = trace.time_by_range()
    # The run has no evaluation.
    expected = {kind.value for kind in Range} - {Range.EVALUATION.value}
    assert expected <= {kind_of(row.name) for row in rows}
    layers = [row for row in rows if row.name.startswith("forward: layer ")]
    packs = 2
    assert layers and all(row.calls == packs * len(trace.steps) for row in layers)
    own = sum(row.own for row in rows)
    assert own == pytest.approx(trace.seconds, rel=1e-6)
    sent = trace.communication()
    assert 0 < sent.exposed <= sent.total <= trace.seconds
    log = (place.folder / "home_traced" / "rank1.log").read_text()
    assert f"trace of steps 3 to 4 of rank 1: {traced[0]}. Open" in log


def test_a_traced_run_computes_what_a_run_without_a_trace_does(place: Place, traced: list[Path]):
    place.run("plain")
    assert not (place.of("plain") / "traces").exists()
    assert "loss" in REPEATED and curve(place, "traced") == curve(place, "plain")
    assert len(curve(place, "plain")) == STEPS


@pytest.mark.slow
def test_a_file_in_the_folder_of_a_running_job_asks_for_a_trace(place: Place):
    steps = 16
    run = place.start(
        "asked",
        fault={"kind": "slow", "seconds": 0.05},
        steps=steps,
        checkpoint={"every": 0},
        logging={"every": 1, "trace": {"steps": [4, 4]}},
    )
    request = place.of("asked") / "trace"
    while not place.steps("asked"):
        time.sleep(0.01)
        assert None in run.poll(), run.output()
    request.write_text("{steps: 2, rank: [0]}")
    while "WARNING" not in run.logs[0].read_text():
        time.sleep(0.01)
        assert None in run.poll(), run.output()
    request.write_text("{steps: 2, ranks: [0, 1]}")
    assert run.wait() == [0, 0], run.output()
    log = run.logs[0].read_text()
    assert "asks for no trace that can be made: rank: unknown key; did you mean 'ranks'?" in log
    first = int(log.partition("a trace was asked for: steps ")[2].split()[0])
    names = sorted(path.name for path in (place.of("asked") / "traces").iterdir())
    assert [f"step_{first}-{first + 1}_rank{rank}.json.gz" for rank in (0, 1)] == [
        name for name in names if name.startswith(f"step_{first}-")
    ]
    assert len(names) == 3 and "step_4-4_rank0.json.gz" in names
    assert not request.exists()


def test_the_summary_is_printed_as_a_table_and_as_json_with_a_picture(
    traced: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture
):
    png = tmp_path / "summary.png"
    assert trace_summary.main([str(traced[0]), "--png", str(png)]) == 0
    printed = capfd.readouterr().out
    assert "forward: layers" in printed and "hidden by computing" in printed
    assert "2 step(s) of rank 1 on a CPU" in printed and png.read_bytes()[1:4] == b"PNG"
    assert trace_summary.main([str(traced[0]), "--json", "--top", "3"]) == 0
    summary = json.loads(capfd.readouterr().out)
    assert len(summary["kernels"]["longest"]) == 3
    assert {row["name"] for row in summary["ranges"]} > {"backward", "optimizer", "losses"}
    assert traced[0].with_name("step_3-4_rank1.png").exists()
