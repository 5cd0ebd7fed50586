"""What adapters save in time: the table of the documentation, and what an estimate says."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.suite.scenarios import SCENARIOS
from uno_ds.commands import estimate
from uno_ds.cost.adapters import adapters_of
from uno_ds.cost.flops import flops
from uno_ds.cost.work import work_of
from uno_ds.recipe import load_recipe

ADAPTERS = Path(__file__).parents[2] / "docs/adapters.md"
RECIPE = "bagel_7b_uno_lora"


def test_the_table_of_the_documentation_has_every_scenario_with_the_ratios_of_the_cost_model():
    recipe = load_recipe(RECIPE, absent=[])
    listed = {}
    for line in ADAPTERS.read_text(encoding="utf-8").splitlines():
        found = re.fullmatch(r"\| ([A-Z]) \|((?: [\d.]+ \|){4})", line)
        if found:
            listed[found[1]] = [float(cell) for cell in found[2].split("|")[:4]]
    assert listed.keys() == SCENARIOS.keys()
    for name, scenario in SCENARIOS.items():
        whole = flops(recipe.architecture, scenario)
        adapted = flops(recipe.architecture, scenario, adapters_of(recipe))
        ratios = [
            adapted.flow_structured / whole.flow_structured,
            adapted.uno_structured / whole.uno_structured,
            whole.uno_structured / whole.flow_structured,
            adapted.uno_structured / adapted.flow_structured,
        ]
        assert listed[name] == pytest.approx(ratios, abs=0.0051), name


def test_an_estimate_with_a_rate_states_the_seconds_with_and_without_adapters(
    capsys: pytest.CaptureFixture,
):
    flags = ["--recipe", RECIPE, "--world-size", "8", "--rate", "400"]
    flags += ["--set", "model.recompute=false"]
    assert estimate.main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    time, recipe = found["time"], load_recipe(RECIPE, absent=[])
    saved = time["computing_seconds_in_full"] - time["computing_seconds"]
    # Base weights of the generation expert have no gradient, adapters have three products.
    shape, pack = recipe.architecture, estimate.Scenario(**found["scenario"])
    rows = work_of(shape, pack).generation
    expert = 2 * shape.hidden * (shape.query_width + shape.key_width) + 3 * shape.hidden * shape.mlp
    adapters = adapters_of(recipe)
    assert adapters is not None
    flop = 2 * rows * (shape.layers * expert - 3 * adapters.products)
    assert saved == pytest.approx(flop / 400e12, rel=1e-6)
    assert estimate.main(flags) == 0
    printed = capsys.readouterr().out
    assert f"computing takes {time['computing_seconds']:.3g} s of a step with adapters" in printed
    assert f"{time['computing_seconds_in_full']:.3g} s with the whole generation" in printed
    assert "adapters do 0." in printed
    plain = ["--recipe", "bagel_7b_uno", "--world-size", "8", "--rate", "400"]
    assert estimate.main([*plain, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["time"]["computing_seconds_in_full"] is None
