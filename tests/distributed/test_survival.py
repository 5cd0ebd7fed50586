"""Runs that destroy their own weights keep a checkpoint from before; runs whose disk fills up or
whose folder goes away end in order."""

from itertools import product
from pathlib import Path

import pytest
from fault_table import TABLE, Survived
from ranks import ForkServer
from runs import GO_ON, Place, curve, slow_unless

from uno_ds.training.finish import STOPPED
from uno_ds.training.metrics import read_metrics

STEPS, RUINED, EVERY, PROVEN = 12, 7, 2, 4
RUN = {
    "steps": STEPS,
    "checkpoint": {"every": EVERY, "keep_last": 2},
    "engine": {"max_skipped_steps": 3},
}
# What the ruined step is taken with, in learning rates: the next losses overflow, or are finite and
# far too high.
FACTORS = OVERFLOWS, TOO_HIGH = 1e30, 1e3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Place:
    return Place(tmp_path_factory.mktemp("divergence"), server)


@pytest.fixture(scope="module")
def whole(place: Place) -> str:
    place.run("whole", **RUN)
    return "whole"


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("factor", "background"), slow_unless((OVERFLOWS, False), [*product(FACTORS, (False, True))])
)
def test_a_ruinous_step_leaves_a_checkpoint_from_before_it_from_which_the_run_goes_on(
    place: Place, whole: str, factor: float, background: bool
):
    name = f"ruined{factor:.0e}{background}"
    changes = {**RUN, "checkpoint": RUN["checkpoint"] | {"asynchronous": background}}
    run = place.start(name, fault={"kind": "ruin", "step": RUINED, "factor": factor}, **changes)
    overflows = factor == OVERFLOWS
    assert run.wait() == ([STOPPED] * 2 if overflows else [0, 0]), run.output()
    rows = read_metrics(place.of(name) / "metrics.jsonl")
    assert [row["loss"] for row in rows[:RUINED]] == [
        row["loss"] for row in curve(place, whole)[:RUINED]
    ]
    assert rows[-1]["skipped"] == (3 if overflows else 0)
    ruined = rows[RUINED:]
    assert ruined
    if not overflows:
        assert all(row["loss"] > 3 * rows[0]["loss"] for row in ruined)
    last = rows[-1]["step"]
    assert {f"step_{PROVEN}", f"step_{PROVEN + EVERY}", f"step_{last}"} <= set(
        checkpoints(place.of(name))
    )
    # One that was on its way in the background had not yet pushed out the oldest.
    assert len(checkpoints(place.of(name))) <= 2 * RUN["checkpoint"]["keep_last"] + background
    assert f"warning: step_{last} is saved in doubt: " in run.logs[0].read_text()

    output = place.run(name, *GO_ON, **changes).logs[0].read_text()
    assert f"continues after step {PROVEN} from" in output
    assert f"--resume skips step_{last}: its weights are in doubt: " in output
    assert curve(place, name) == curve(place, whole)
    how = "skipped steps" if overflows else "losses out of range"
    TABLE.append(Survived(f"one ruinous step, then {how}", True, last - PROVEN))


# One rank and few steps: what is written is what counts.
SHORT = {**RUN, "steps": 6, "ranks": 1}


def test_a_disk_without_room_for_anything_costs_files_and_not_the_run(place: Place):
    reported = place.folder / "full.exit"
    run = place.start(
        "full",
        *("--exit-file", str(reported)),
        fault={"kind": "fill", "step": 3, "largest": 600},
        **SHORT,
    )
    assert run.wait() == [1], run.output()
    # It went on to its last step, and says so where there is room: the log is as full as all else.
    code, _, reason = reported.read_text().strip().partition(" ")
    assert code == "1" and reason.startswith(
        "completed, but its last checkpoint could not be saved"
    )
    for file in ("metrics.jsonl", "curves.png"):
        assert file in reason
    assert place.steps("full")[:2] == [1, 2] and checkpoints(place.of("full")) == ["step_2"]
    TABLE.append(Survived("no room for any file from one step on", True, 4))


def test_a_run_folder_that_is_deleted_in_mid_run_is_made_again(place: Place):
    folder = place.of("deleted")
    fault = {"kind": "delete", "step": 4, "folder": str(folder)}
    run = place.run("deleted", fault=fault, **SHORT)
    assert "metrics.jsonl was deleted during the run" in run.logs[0].read_text()
    assert place.steps("deleted") == list(range(1, 7))
    names = {path.name for path in folder.iterdir()}
    assert {"recipe.yaml", "summary.json", "curves.png", "checkpoints"} <= names
    TABLE.append(Survived("run folder deleted in mid-run", True, 0))
