"""A checkpoint says which target it was trained with where weights do not."""

import pytest
import torch
from vision_folders import write_dinov2

from uno_ds.model.regression_metadata import identity_in
from uno_ds.recipe import load_recipe
from uno_ds.settings import SettingsError
from uno_ds.training.export import write_extra
from uno_ds.training.regression_identity import (
    check_identity,
    foreign_weights,
    regression_identity,
)


def recipe(*overrides: str):
    return load_recipe("tiny", list(overrides))


def own(folder) -> tuple[str, str]:
    return "objective.regression_target=encoder", f"objective.regression_encoder={folder}"


def test_targets_of_the_models_encoder_leave_nothing_in_the_manifest():
    assert regression_identity(recipe()) == {}
    assert regression_identity(recipe("objective.regression_target=connector")) == {}
    without = recipe("objective.regression_weight=0", "sequence.metaquery_grid=0")
    assert regression_identity(without) == {}


def test_an_encoder_is_named_by_the_hash_of_its_files(tmp_path):
    first, same, other = (
        regression_identity(recipe(*own(write_dinov2(tmp_path / name, seed=seed))))
        for name, seed in (("first", 0), ("same", 0), ("other", 1))
    )
    assert first == same and first["target"] == "encoder" and first["encoder"] != other["encoder"]
    check_identity("step_1", first, same)
    with pytest.raises(SettingsError) as refused:
        check_identity("step_1", first, other)
    said = str(refused.value)
    assert said.startswith("--resume: step_1 was trained with another regression: ")
    assert first["encoder"] in said and other["encoder"] in said and "\n" not in said


@pytest.mark.parametrize("saved", [{}, None, 3, {"target": "\n" * 500}])
def test_any_other_entry_is_refused_in_one_line(saved):
    ours = regression_identity(recipe("objective.regression_target=hog"))
    assert ours == {"target": "hog"}
    with pytest.raises(SettingsError) as refused:
        check_identity("step_1", saved, ours)
    assert "\n" not in str(refused.value)


def test_several_grids_are_named():
    several = recipe("sequence.metaquery_grid=[4, 2]")
    assert regression_identity(several) == {"grids": [4, 2]}
    assert regression_identity(recipe("sequence.metaquery_grid=[4]")) == {}


def test_a_base_lends_the_weights_that_were_trained_for_the_same():
    grids, target = {"grids": [4, 3]}, {"target": "hog"}
    assert foreign_weights({}, {}) == foreign_weights(grids | target, grids | target) == {}
    # 25 rows, as those of one 5 x 5 grid.
    assert foreign_weights(grids, {}).keys() == {"metaqueries.weight"}
    assert foreign_weights(target, {}).keys() == {"regression.weight"}
    assert foreign_weights(grids, target).keys() == {"metaqueries.weight", "regression.weight"}


def test_an_export_says_what_its_metaqueries_were_trained_for(tmp_path):
    like = {"metaqueries.weight": torch.empty(20, 4, device="meta")}
    for identity in ({"grids": [4, 2]}, {}):
        write_extra(tmp_path, like, lambda name: torch.zeros(20, 4), identity)
        assert identity_in(tmp_path) == identity


def test_normalised_targets_are_others():
    spatial = "objective.regression_target_norm=spatial"
    whole, share = (
        regression_identity(recipe(spatial, f"objective.regression_mean_share={given}"))
        for given in (1, 0.8)
    )
    assert whole == {"norm": ["spatial", 1.0]} and share == {"norm": ["spatial", 0.8]}
    assert foreign_weights(whole, {}).keys() == {"regression.weight"}
    for saved, ours in ((whole, {}), ({}, whole), (whole, share)):
        with pytest.raises(SettingsError, match="another regression"):
            check_identity("step_1", saved, ours)
