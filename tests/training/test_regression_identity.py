"""A checkpoint says which target it was trained with where weights do not."""

import pytest
from vision_folders import write_dinov2

from uno_ds.recipe import load_recipe
from uno_ds.settings import SettingsError
from uno_ds.training.regression_identity import check_identity, regression_identity


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
