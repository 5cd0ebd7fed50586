"""A planned run whose supervision ends: both kinds of packs are planned, and its hours are those of
the supervised steps and of the others."""

import json
from typing import Any

import pytest
from no_launcher import remove_launcher
from vision_folders import write_dinov2

from uno_ds.commands.dry_run import estimate
from uno_ds.commands.estimate import main
from uno_ds.cost.scenario import fullest_packs, packs_of_run
from uno_ds.recipe import load_recipe
from uno_ds.recipe_checks import warnings_of_recipe

STEPS = 100


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Any:
    remove_launcher(monkeypatch)

    def planned(*assignments: str) -> dict[str, Any]:
        given = [f"steps={STEPS}", "objective.supervision_decay=none", *assignments]
        flags = [word for assignment in given for word in ("--set", assignment)]
        assert main(["--recipe", "bagel_7b_uno", "--rate", "400", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    return planned


def test_hours_are_those_of_both_kinds_of_steps(planned):
    uno = planned()
    flow = planned("objective.caption_weight=0", "objective.regression_weight=0")
    ending = planned("objective.supervise_until=0.3")
    assert (uno["supervised_steps"], ending["supervised_steps"]) == (STEPS, 30)
    assert ending["scenario"] == uno["scenario"] and ending["flops"] == uno["flops"]
    for ours, longer, shorter in zip(
        ending["time"]["gpu_hours"],
        uno["time"]["gpu_hours"],
        flow["time"]["gpu_hours"],
        strict=True,
    ):
        assert shorter != longer
        # The traffic of the metaqueries and their head goes on; it is 1e-6 of all.
        assert ours == pytest.approx(0.3 * longer + 0.7 * shorter, rel=1e-3)


def test_later_packs_are_those_of_flow_matching_and_count_for_memory():
    ending = load_recipe("tiny", ["objective.supervise_until=0.5"])
    flow = load_recipe("tiny", ["objective.caption_weight=0", "objective.regression_weight=0"])
    packs = packs_of_run(ending, ["t2i", "edit"])
    later = fullest_packs(flow, ["t2i", "edit"])
    assert packs == fullest_packs(ending, ["t2i", "edit"]) | {
        f"{name}, unsupervised": pack for name, pack in later.items()
    }
    assert packs_of_run(load_recipe("tiny"), ["t2i"]) == fullest_packs(ending, ["t2i"])
    peak = estimate(ending, 1, ["t2i"]).memory.peak
    # Latents that train keep more than supervision does.
    assert peak > estimate(load_recipe("tiny"), 1, ["t2i"]).memory.peak


@pytest.mark.parametrize(
    "assignments",
    [
        ["regression_loss=contrastive", "regression_negatives=ranks"],
        ["regression_target=hog", "regression_target_norm=spatial"],
        ["negative_weight=0.1", "balance=gradient_norm", "supervision_decay=cosine"],
        ["flow_contrast=0.05", "caption_weight_by_t=[[0.0, 1.0], [0.5, 0.0]]"],
    ],
)
def test_whatever_the_supervision_is_its_end_can_be_planned(assignments):
    given = [f"objective.{assignment}" for assignment in assignments]
    ending = load_recipe("tiny", ["objective.supervise_until=0.5", *given])
    later = ending.unsupervised().objective
    assert later.weights["caption"] == later.weights["regression"] == 0
    assert later.flow_contrast == ending.objective.flow_contrast
    assert "negative" not in later.weights
    assert estimate(ending, 1, ["t2i"]).memory.peak > 0


def test_a_target_of_an_encoder_of_its_own_can_end(tmp_path):
    folder = write_dinov2(tmp_path / "dinov2")
    own = ["objective.regression_target=encoder", f"objective.regression_encoder={folder}"]
    ending = load_recipe("tiny", ["objective.supervise_until=0.5", *own])
    assert ending.unsupervised().objective.regression_encoder is None
    assert estimate(ending, 1, ["t2i"]).memory.peak > 0


def test_an_end_that_rounds_to_the_last_step_is_said():
    given = ["steps=100", "objective.supervise_until=0.999"]
    (line,) = warnings_of_recipe(load_recipe("tiny", given))
    assert line == (
        "objective.supervise_until is 0.999 of 100 steps, which are all of them: supervision does "
        "not end."
    )
    assert not warnings_of_recipe(
        load_recipe("tiny", ["steps=100", "objective.supervise_until=.9"])
    )
