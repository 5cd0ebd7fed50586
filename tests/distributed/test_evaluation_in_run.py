"""Evaluation in a run: the same numbers after a resume and on another number of ranks, and the
training as without it."""

import json

import pytest
from PIL import Image
from ranks import ForkServer
from runs import GO_ON, STEPS, Place, curve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EVALUATE = {
    "evaluate": {
        "every": 3,
        "benchmarks": ["scenes"],
        "prompts": 5,
        "batch": 2,
        "sources": [
            {"path": "scenes/t2i", "name": "pictures"},
            {"path": "scenes/edit", "name": "edits"},
            {"path": "scenes/vlm", "name": "talks"},
        ],
        "rows": 7,
        "times": [0.2, 0.8],
    },
    "samples": {"prompts": ["a red circle."], "steps": 2, "height": 16, "width": 16},
    "logging": {"every": 1, "tensorboard": True},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Place:
    return Place(tmp_path_factory.mktemp("evaluation"), server)


@pytest.fixture(scope="module")
def whole(place: Place) -> str:
    place.run("whole", **EVALUATE)
    return "whole"


def evaluations(place: Place, name: str) -> list[dict[str, float]]:
    text = (place.of(name) / "evaluations.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_losses_per_level_scores_and_pictures_are_written(place: Place, whole: str):
    rows = evaluations(place, whole)
    assert [row["step"] for row in rows] == [0, 3, STEPS]
    # The recipe has a moving average and names no weights.
    assert {row["weights"] for row in rows} == {"average"}
    names = [
        f"{source}/{loss}/t={t}"
        for source in ("pictures", "edits")
        for loss in ("flow", "caption", "regression")
        for t in (0.2, 0.8)
    ]
    assert {*names, "scenes/all", "scenes/relation"} <= set(rows[0])
    # Answers train nothing here and have no level; this run does not read them.
    assert not any(name.startswith("talks/") for name in rows[0])
    # Training moves what is measured; the frozen parts of the pictures stay alike.
    assert all(rows[0][name] != rows[2][name] for name in names)
    run = place.of(whole)
    assert {path.name for path in (run / "evaluations").iterdir()} == {"step_0", "step_3", "step_6"}
    assert Image.open(run / "evaluations/step_3/0000.png").size == (16, 16)
    assert Image.open(run / "evaluations.png").height > 3 * 192
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    losses = board.Scalars("evaluation/pictures/flow/t=0.2")
    assert [event.step for event in losses] == [0, 3, 6]
    assert losses[1].value == pytest.approx(rows[1]["pictures/flow/t=0.2"], rel=1e-6)
    assert [event.step for event in board.Images("evaluation/picture_0")] == [0, 3, 6]


@pytest.mark.slow
def test_the_trained_weights_are_evaluated_on_request(place: Place, whole: str):
    evaluate = {**EVALUATE["evaluate"], "weights": "trained"}
    place.run("trained", **{**EVALUATE, "evaluate": evaluate})
    ours, theirs = evaluations(place, "trained"), evaluations(place, whole)
    assert {row["weights"] for row in ours} == {"trained"}
    # They start alike, and the average lags behind.
    name = "pictures/caption/t=0.2"
    assert ours[0][name] == theirs[0][name] and ours[2][name] != theirs[2][name]
    assert curve(place, "trained") == curve(place, whole)


@pytest.mark.slow
def test_training_is_the_same_to_the_last_bit_with_evaluation_and_without(place: Place, whole: str):
    place.run("without", **{**EVALUATE, "evaluate": {}})
    assert curve(place, "without") == curve(place, whole)
    assert not (place.of("without") / "evaluations.jsonl").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_finds_the_same_numbers(place: Place, whole: str):
    fault = {"kind": "optimizer", "rank": 1, "step": 5}
    run = place.start("killed", fault=fault, **EVALUATE)
    run.wait()
    assert [row["step"] for row in evaluations(place, "killed")] == [0, 3]
    output = place.run("killed", *GO_ON, **EVALUATE).logs[0].read_text()
    assert "continues after step 4" in output
    assert evaluations(place, "killed") == evaluations(place, whole)


@pytest.mark.slow
def test_a_run_that_was_stopped_at_an_evaluation_makes_it_when_it_goes_on(place: Place, whole: str):
    """A request to stop ends the step without it; the next start begins with it."""
    changes = {**EVALUATE, "checkpoint": {"every": 3, "export": False}}
    fault = {"kind": "optimizer", "rank": 1, "step": 4}
    place.start("stopped", fault=fault, **changes).wait()
    path = place.of("stopped") / "evaluations.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n")
    place.run("stopped", *GO_ON, **changes)
    assert evaluations(place, "stopped") == evaluations(place, whole)
    assert json.loads(second)["step"] == 3


@pytest.mark.slow
def test_one_rank_finds_what_two_find_up_to_rounding(place: Place, whole: str):
    """The first evaluation is of the same weights; sums over rows are taken in another order."""
    place.run("alone", ranks=1, **EVALUATE)
    ours, theirs = evaluations(place, "alone")[0], evaluations(place, whole)[0]
    assert ours.pop("weights") == theirs.pop("weights") == "average"
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
