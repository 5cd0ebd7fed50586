"""What logging.trace accepts, and what a recipe says about steps and ranks that do not exist."""

import pytest
from small_runs import tree

from uno_ds.recipe import Recipe
from uno_ds.recipe_checks import warnings_of_recipe
from uno_ds.settings import SettingsError, build
from uno_ds.training.trace_settings import TraceSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": [3]}, "steps: must be [first, last] or [], got 1 number(s)."),
        ({"steps": [5, 4]}, "steps: must be [first, last] with at most 100 steps, got [5, 4]."),
        ({"steps": [1, 101]}, "steps: must be [first, last] with at most 100 steps, got [1, 101]."),
        ({"steps": [0, 1]}, "steps: must be at least 1, got 0."),
        ({"steps": [1, 2], "ranks": []}, "ranks: is [], but steps are to be traced; name a rank."),
    ],
)
def test_steps_and_ranks_that_no_trace_has_are_refused(values: dict, message: str):
    with pytest.raises(SettingsError) as raised:
        build(TraceSettings, values)
    assert str(raised.value) == message
    assert build(TraceSettings, {"steps": [1, 100]}).ranks == [0]


def test_a_rank_that_the_run_does_not_have_is_refused_and_a_late_step_warned_of(tmp_path):
    values = tree(tmp_path, ["scenes/t2i"], steps=4, engine={"packs_per_step": 2})
    values["logging"] = {"trace": {"steps": [5, 6], "ranks": [2]}}
    recipe = build(Recipe, values)
    with pytest.raises(SettingsError) as raised:
        recipe.check_world(2)
    assert str(raised.value) == ("logging.trace.ranks: names rank 2, but the run has ranks 0 to 1.")
    late = "logging.trace.steps is [5, 6], but the run has 4 steps: none is traced."
    assert late in warnings_of_recipe(recipe)
    values["logging"] = {"trace": {"ranks": [2]}}
    build(Recipe, values).check_world(2)
