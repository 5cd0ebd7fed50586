"""A planned run whose supervision ends: both kinds of packs are planned, and its hours are those of
the supervised steps and of the others."""

import json
from typing import Any

import pytest
from no_launcher import remove_launcher

from uno_ds.commands.dry_run import estimate
from uno_ds.commands.estimate import main
from uno_ds.cost.scenario import fullest_packs, packs_of_run
from uno_ds.recipe import load_recipe

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
