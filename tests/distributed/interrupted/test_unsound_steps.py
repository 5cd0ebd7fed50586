"""Steps with NaN, spikes, slow ranks and wrong kernels are noticed by all ranks alike."""

import pytest
import torch
from fault_table import TABLE, Survived
from runs import STEPS, Place, curve
from safetensors.torch import load_file

from uno_ds.training.finish import STOPPED
from uno_ds.training.metrics import read_metrics


def test_a_nan_on_one_rank_skips_the_step_and_the_curve_goes_on_and_resumes(place: Place):
    run = place.run("nan", fault={"kind": "nan", "rank": 1, "step": 3})
    rows = read_metrics(place.of("nan") / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1] and rows[2]["loss"] is None
    assert all(row["loss"] for row in rows if row["step"] != 3)
    (line,) = [
        line for line in run.logs[0].read_text().splitlines() if line.startswith("step 3 skipped")
    ]
    assert "the loss is not finite; samples of rank 1: " in line and "rank 0" not in line
    TABLE.append(Survived("NaN on rank 1 in one step", True, 1))


def test_nans_in_a_row_end_the_run_cleanly_with_a_checkpoint_of_the_last_good_state(
    place: Place, whole: str
):
    run = place.start(
        "nans",
        fault={"kind": "nan", "rank": 0, "step": 3, "steps": 2},
        engine={"max_skipped_steps": 2},
    )
    assert run.wait() == [STOPPED, STOPPED], run.output()
    assert (
        "This was the 2th skipped step in a row (engine.max_skipped_steps = 2)"
        in place.summary("nans")["exit"]
    )
    good, last = (
        load_file(place.of(name) / f"checkpoints/step_{step}/rank_00000.safetensors")
        for name, step in ((whole, 2), ("nans", 4))
    )
    assert good and all(torch.equal(good[name], last[name]) for name in good)
    TABLE.append(Survived("NaN in two steps in a row, two being the limit: clean stop", True, 2))


@pytest.mark.parametrize(
    "action",
    ["skip", *(pytest.param(action, marks=pytest.mark.slow) for action in ("warn", "stop"))],
)
def test_a_spike_of_the_loss_is_left_out_or_ends_the_run_on_all_ranks_alike(
    place: Place, whole: str, action: str
):
    name = f"spike_{action}"
    run = place.start(
        name,
        fault={"kind": "spike", "rank": 1, "step": 4, "factor": 50.0},
        health={"spike_factor": 3, "spike_window": 2, "spike_action": action},
    )
    assert run.wait() == ([STOPPED] * 2 if action == "stop" else [0, 0]), run.output()
    rows, output = read_metrics(place.of(name) / "metrics.jsonl"), run.logs[0].read_text()
    assert (
        curve(place, name)[:3] == curve(place, whole)[:3] and rows[3]["loss"] > 3 * rows[2]["loss"]
    )
    assert "is above 3 medians of the last 2 losses" in output
    assert rows[-1]["skipped"] == (action != "warn") and rows[-1]["step"] == (
        4 if action == "stop" else STEPS
    )
    last, before, after = (
        load_file(place.of(run) / f"checkpoints/step_{step}/rank_00000.safetensors")
        for run, step in ((name, 4), (whole, 4), (whole, 6))
    )
    weight = "weight/model.vae2llm.weight"
    assert not last[weight].equal(before[weight]) and last[weight].shape == after[weight].shape
    TABLE.append(
        Survived(f"spike of the loss, spike_action = {action}", True, 0 if action == "warn" else 1)
    )


@pytest.mark.timed
def test_a_slow_rank_is_named_and_a_run_of_equal_ranks_names_none(place: Place, whole: str):
    run = place.run(
        "slow", fault={"kind": "slow", "rank": 1, "seconds": 0.25}, logging={"every": 3}
    )
    lines = [line for line in run.logs[0].read_text().splitlines() if " is slow: busy for " in line]
    assert len(lines) == 1 and lines[0].startswith("warning: rank 1 is slow")
    ranks = place.summary("slow")["ranks"]
    # Two micro-batches a step. What the ranks do besides differs by less than all of it.
    usual, slow = ranks["busy_seconds"]
    assert ranks["slowest"] == 1 and slow - usual == pytest.approx(0.5, abs=0.2 + usual)
    assert curve(place, "slow") == curve(place, whole)


@pytest.mark.parametrize("action", ["stop", pytest.param("warn", marks=pytest.mark.slow)])
def test_a_kernel_that_turns_wrong_on_one_rank_is_found_by_the_check_and_a_right_one_passes(
    place: Place, whole: str, action: str
):
    health = {"kernel_check_every": 2, "kernel_check_action": action}
    if action == "stop":
        place.run("right", health=health)
        assert curve(place, "right") == curve(place, whole)
    run = place.start(
        f"wrong_{action}", fault={"kind": "kernel", "rank": 1, "step": 3}, health=health
    )
    assert run.wait() == ([STOPPED, STOPPED] if action == "stop" else [0, 0]), run.output()
    output = run.logs[0].read_text()
    assert (
        "kernel check of step 4, rank 1: attention by sdpa: the output is off by" in output
        and "kernel check of step 2" not in output
    )
    assert place.steps(f"wrong_{action}")[-1] == (4 if action == "stop" else STEPS)
    TABLE.append(
        Survived(f"attention wrong by 1 % on rank 1, kernel_check_action = {action}", True)
    )
