"""Schedules, contrast, negatives and balance of the losses: neutral by default, and a contradiction
is refused in one line that names the key."""

import pytest
import yaml

from uno_ds.objectives.uno import LOSSES
from uno_ds.recipe import load_recipe
from uno_ds.settings import SettingsError, to_plain

NO_SUPERVISION = ["objective.caption_weight=0", "objective.regression_weight=0"]


@pytest.mark.parametrize("name", ["tiny", "tiny_base"])
def test_by_default_there_is_no_further_loss_no_schedule_and_no_weight(name):
    recipe = load_recipe(name)
    assert recipe.supervision_schedule is None and recipe.supervised_steps == recipe.steps
    assert tuple(recipe.objective.weights) == LOSSES
    composer = recipe.composer(None)
    assert not composer.caption_weight_by_t and not composer.regression_weight_by_t


@pytest.mark.parametrize(
    "assignments, message",
    [
        (
            ["objective.supervise_until=0"],
            "objective.supervise_until: must be greater than 0, got 0.0.",
        ),
        (
            ["objective.supervise_until=1.5"],
            "objective.supervise_until: must be at most 1, got 1.5.",
        ),
        (
            ["objective.supervise_until=0.5", *NO_SUPERVISION],
            "objective.supervise_until: is 0.5, but objective.caption_weight and "
            "objective.regression_weight are 0: there is no supervision to end; raise one of them, "
            "or remove supervise_until.",
        ),
        (
            ["objective.supervise_until=0.001", "steps=100"],
            "objective.supervise_until: is 0.001 of 100 steps, which is no step; raise it, or set "
            "the weights of the understanding losses to 0.",
        ),
        (
            ["objective.supervise_until=0.5", "objective.flow_weight=0", "steps=100"],
            "objective.supervise_until: is 0.5, but objective.flow_weight is 0: after step 50 "
            "nothing is left to train; raise the weight, or remove supervise_until.",
        ),
        (
            ["objective.supervision_decay=cosine"],
            "objective.supervision_decay: is cosine, but objective.supervise_until is 1, so that "
            "supervision does not end; give the share of steps at which it ends.",
        ),
        (
            ["objective.supervision_decay=linear"],
            "objective.supervision_decay: must be one of none, cosine; got 'linear'.",
        ),
        (
            ["objective.caption_weight_by_t=[[0, 1], [1, 0]]", "objective.caption_weight=0"],
            "objective.caption_weight_by_t: is set, but objective.caption_weight is 0; raise it, "
            "or remove caption_weight_by_t.",
        ),
        (
            ["objective.regression_weight_by_t=[[0.5, 1], [0.2, 0]]"],
            "objective.regression_weight_by_t: has t = 0.2 after t = 0.5; each t must be above the "
            "one before it.",
        ),
        (
            ["objective.regression_weight_by_t=[0.5, 1]"],
            "objective.regression_weight_by_t.0: must be a list, got 0.5.",
        ),
        (
            [
                "objective.caption_weight_by_t=[[0.5, 1], [0.7, 0]]",
                "sequence.supervision_window=[0.7, 1]",
            ],
            "objective.caption_weight_by_t: is 0 at every t of sequence.supervision_window, "
            "[0.7, 1.0]; widen the window, or change the weights.",
        ),
        (
            ["objective.flow_contrast=1"],
            "objective.flow_contrast: must be below 1, got 1.0.",
        ),
        (
            ["objective.flow_contrast=-0.1"],
            "objective.flow_contrast: must be at least 0, got -0.1.",
        ),
        (
            ["objective.flow_contrast=0.05", "objective.flow_weight=0"],
            "objective.flow_contrast: is 0.05, but objective.flow_weight is 0, of which it is a "
            "share; raise the weight, or set flow_contrast to 0.",
        ),
        (
            ["objective.negative_weight=0.1", "objective.caption_weight=0"],
            "objective.negative_weight: is above 0, but objective.caption_weight is 0: there is no "
            "caption that a negative could be compared with; raise it, or set negative_weight to "
            "0.",
        ),
        (
            ["objective.flow_contrast=0.05", "data.max_samples_per_pack=1"],
            "objective.flow_contrast: is 0.05, which needs other samples in a pack, but "
            "data.max_samples_per_pack is 1; raise it.",
        ),
        (
            [
                "objective.negative_weight=0.1",
                "objective.negative_source=pack",
                "data.max_samples_per_pack=1",
            ],
            "objective.negative_source: is pack, which needs other samples in a pack, but "
            "data.max_samples_per_pack is 1; raise it.",
        ),
        (
            ["objective.balance=gradient_norm", *NO_SUPERVISION],
            "objective.balance: is gradient_norm, which needs flow matching and an understanding "
            "loss, but objective.flow_weight or both objective.caption_weight and "
            "objective.regression_weight are 0; raise them, or set balance to none.",
        ),
        (
            ["objective.negative_form=square"],
            "objective.negative_form: must be one of softplus, hinge; got 'square'.",
        ),
        (
            ["objective.negative_source=web"],
            "objective.negative_source: must be one of column, pack; got 'web'.",
        ),
    ],
)
def test_a_contradiction_is_refused(assignments, message):
    with pytest.raises(SettingsError) as refused:
        load_recipe("tiny", assignments)
    assert str(refused.value) == message


def test_a_resolved_recipe_with_every_key_is_a_recipe(tmp_path):
    given = [
        "objective.supervise_until=0.7",
        "objective.supervision_decay=cosine",
        "objective.caption_weight_by_t=[[0.0, 1], [0.7, 0.5]]",
        "objective.flow_contrast=0.05",
        "objective.negative_weight=0.2",
        "objective.negative_source=pack",
        "objective.balance=gradient_norm",
    ]
    recipe = load_recipe("tiny", given)
    plain = {key: value for key, value in to_plain(recipe).items() if key != "architecture"}
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(plain))
    assert load_recipe(str(tmp_path / "resolved.yaml")).objective == recipe.objective
    assert recipe.supervised_steps == round(0.7 * recipe.steps)
    assert recipe.objective.weights["contrast"] == -0.05 * recipe.objective.flow_weight
