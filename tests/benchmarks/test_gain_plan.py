"""What a call of an experiment plans, and that it is carried out so."""

import json
import threading

import pytest
from small_experiment import FLOW, experiment_of, written

from benchmarks.suite import gain_controller
from benchmarks.suite.gain_experiment import read_experiment
from benchmarks.suite.gain_plan import (
    Speed,
    expected_steps,
    items_of,
    plan,
    plan_lines,
    seconds_of,
)
from benchmarks.suite.gain_runs import ArmRun, Machine


@pytest.mark.parametrize(
    ("flow", "other", "steps", "expected"),
    [
        # 8 steps of 1.5 cost 12 of 1.
        ([1.0] * 8, [1.5] * 8, 8, 12),
        # In doubt the baseline has more.
        ([1.0] * 8, [1.26] * 8, 8, 11),
        # The same arm: the same step, whatever the rounding of sums.
        ([0.1] * 8, [0.1] * 8, 8, 8),
        # Twice the steps of the same samples: the same step, though later packs are larger.
        ([1.0] * 8, [1.0] * 8 + [1.3] * 8, 16, 16),
        # It does not change once the baseline is trained beyond.
        ([1.0] * 8 + [9.0] * 8, [1.5] * 8, 8, 12),
        # A cheaper arm.
        ([1.0] * 8, [0.5] * 8, 8, 4),
    ],
)
def test_the_baseline_has_cost_as_much_at(tmp_path, flow, other, steps, expected):
    experiment = experiment_of(tmp_path, arms={"flow": FLOW, "other": [f"steps={steps}"]})
    runs = [ArmRun(experiment, arm, 0, tmp_path) for arm in ("flow", "other")]
    for run, flops in zip(runs, (flow, other), strict=True):
        run.folder.mkdir()
        lines = [json.dumps({"mfu": value / 1e12, "step_seconds": 1.0}) for value in flops]
        (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert runs[0].equal_flop_step(runs[1]) == expected


def test_the_baseline_trains_on_for_the_cost_of_the_others(tmp_path):
    experiment = experiment_of(tmp_path, arms={"flow": FLOW, "uno": [], "long": ["steps=20"]})
    speed = Speed({}, {"flow": 2.0, "uno": 2.7, "long": 2.0}, 1.0, 0.1, 1.0)
    assert expected_steps(experiment, ["uno"], speed) == 11
    assert expected_steps(experiment, ["uno", "long"], speed) == 20
    titles = [
        item.title
        for item in items_of(experiment, tmp_path, ["flow", "uno"], ["validation"], speed)
    ][:3]
    assert titles == [
        "flow-seed0 to step 8",
        "uno-seed0 to step 8",
        "flow-seed0 to step 11 (cost of uno)",
    ]


def test_seeds_count_on_from_the_first_one(tmp_path):
    experiment = experiment_of(tmp_path, seeds=2, arm_seeds={"uno": 1}, first_seed=5)
    items = items_of(experiment, tmp_path, ["uno", "flow"], ["validation"])
    names = [item.run.name for item in items]
    assert names == ["uno-seed5", "flow-seed5", "flow-seed5", "flow-seed6"]
    assert "seed=5" in items[0].run.train_command(8, Machine(1, 1))


def test_the_plan_leaves_out_what_does_not_fit_and_says_so(tmp_path):
    experiment = experiment_of(tmp_path, seeds=2)
    speed = Speed({"flow": 1.0, "uno": 2.0}, {"flow": 2.0, "uno": 3.0}, 10.0, 0.5, 4.0)
    splits = ["validation"]
    items = items_of(experiment, tmp_path, ["flow", "uno"], splits, speed)
    seconds = [seconds_of(item, speed, splits) for item in items]
    # 8 steps, two starts, 4 + 6 pictures, one last point; beyond: 4 steps more and 6 pictures.
    first = 8 * 1.0 + 2 * 10 + 10 * 0.5 + 4
    uno = 8 * 2.0 + 2 * 10 + 10 * 0.5 + 4
    beyond = 4 * 1.0 + 2 * 10 + 6 * 0.5 + 4
    assert seconds == [first, uno, beyond] * 2
    everything = plan(items, seconds, 1, None)
    assert [entry.end for entry in everything][-1] == 2 * (first + uno + beyond)
    some = plan(items, seconds, 1, first + uno + beyond + 1)
    assert [entry.end is not None for entry in some] == [True] * 3 + [False] * 3
    text = "\n".join(plan_lines(some, 1, 118.0))
    assert text.count("DOES NOT FIT") == 3 and "3 item(s) do not fit" in text


def test_the_baseline_beyond_its_steps_waits_and_holds_no_process_meanwhile(
    tmp_path,
):
    experiment = experiment_of(tmp_path, seeds=2)
    speed = Speed({"flow": 1.0, "uno": 2.0}, {"flow": 2.0, "uno": 3.0}, 10.0, 0.5, 4.0)
    items = items_of(experiment, tmp_path, ["flow", "uno"], ["validation"], speed)
    # flow, uno and the baseline beyond, of either seed.
    seconds = [30.0, 50.0, 20.0, 30.0, 50.0, 20.0]
    ends = [entry.end for entry in plan(items, seconds, 2, None)]
    assert ends == [30.0, 50.0, 70.0, 60.0, 110.0, 130.0]
    # Where the second UNO is left out, the baseline is not: its steps may be known.
    ends = [entry.end for entry in plan(items, seconds, 2, 90.0)]
    assert ends == [30.0, 50.0, 70.0, 60.0, None, 80.0]


def test_items_are_carried_out_as_they_were_planned(tmp_path, monkeypatch):
    path = written(tmp_path, seeds=2)
    experiment = read_experiment(str(path))
    controller = gain_controller.Controller(str(path), experiment, tmp_path / "runs", Machine(2, 1))
    items = items_of(experiment, tmp_path / "runs", ["flow", "uno"], ["validation"])
    titles = [f"{item.run.name}{' beyond' if item.equal_to else ''}" for item in items]
    log, both_run = [], threading.Barrier(2, timeout=60)

    def carried_out(self, item, splits, budget):
        title = titles[items.index(item)]
        log.append(("begins", title))
        # uno-seed0 goes on until the second seed's flow has begun beside it.
        if title in ("uno-seed0", "flow-seed1"):
            both_run.wait()
        log.append(("ends", title))

    monkeypatch.setattr(gain_controller.Controller, "_carry_out", carried_out)
    controller.carry_out(items, ["validation"], None)
    assert sorted(title for event, title in log if event == "ends") == sorted(titles)
    for seed in (0, 1):
        begun = log.index(("begins", f"flow-seed{seed} beyond"))
        for arm in ("flow", "uno"):
            assert log.index(("ends", f"{arm}-seed{seed}")) < begun
