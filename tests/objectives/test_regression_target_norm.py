"""Spatial normalisation of regression targets: its formula, its gradient, and what contradicts
it."""

import numpy as np
import pytest
import torch
from dense_comparison import check_against_dense
from tiny_objective import collate, loss_counts, make_composer, mixed_pack, tiny_objective

from uno_ds.objectives.regression_target import normalised
from uno_ds.objectives.uno import ObjectiveSettings
from uno_ds.recipe import load_recipe
from uno_ds.recipe_checks import warnings_of_recipe
from uno_ds.settings import SettingsError, build

SPATIAL = "objective.regression_target_norm=spatial"


def spatial(share: float) -> ObjectiveSettings:
    return build(
        ObjectiveSettings, {"regression_target_norm": "spatial", "regression_mean_share": share}
    )


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_each_image_is_normalised_on_its_own_by_the_formula(share):
    lengths = (1, 6, 13)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((sum(lengths), 5)) * 3 + 2
    features[1:7, 4] = 7.0
    wanted = []
    for image in np.split(features, np.cumsum(lengths)[:-1]):
        deviation = np.sqrt(((image - image.mean(axis=0)) ** 2).mean(axis=0))
        wanted.append((image - share * image.mean(axis=0)) / (deviation + 1e-6))
    got = normalised(torch.from_numpy(features), lengths, spatial(share))
    # Of a constant feature what is left of rounding is divided by 1e-6.
    torch.testing.assert_close(got.numpy(), np.concatenate(wanted), rtol=1e-9, atol=1e-8)
    if share == 1:
        assert not got[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_computed_in_double_and_given_in_the_dtype_of_the_features(dtype):
    features = (100 + torch.randn(40, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    got = normalised(features, (40,), spatial(1.0))
    wanted = normalised(features.double(), (40,), spatial(1.0)).to(dtype)
    assert got.dtype == dtype and torch.equal(got, wanted)


@pytest.mark.parametrize("value", [1.7, 50.3, 511.7])
def test_a_constant_feature_becomes_zero_in_single_precision_too(value):
    """What rounding leaves of it in single precision would be divided by itself."""
    got = normalised(torch.full((4096, 2), value), (4096,), spatial(1.0))
    assert got.abs().max() < 1e-4


def test_no_image_and_no_normalisation_leave_the_features_as_they_are():
    features = torch.randn(4, 3)
    assert normalised(features, (4,), ObjectiveSettings()) is features
    assert normalised(features[:0], (), spatial(1.0)).shape == (0, 3)


@pytest.mark.parametrize("target", ["vit", "connector"])
@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
def test_loss_and_gradient_equal_the_dense_implementation(target, kind):
    check_against_dense(
        2,
        stop=True,
        grid=3,
        regression_target=target,
        regression_loss=kind,
        regression_target_norm="spatial",
        regression_mean_share=0.7,
    )


def test_it_changes_the_loss():
    batch = collate(mixed_pack(0, make_composer()))
    losses = []
    for norm in ("none", "spatial"):
        objective = tiny_objective(regression_target_norm=norm)
        losses.append(float(objective(batch, loss_counts(batch))[1][2]))
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [SPATIAL, "objective.regression_weight=0"],
            "objective.regression_target_norm: is spatial, but objective.regression_weight is 0",
        ),
        (
            [SPATIAL, "sequence.metaquery_grid=1"],
            "objective.regression_mean_share: is 1, but the one cell of a sequence.metaquery_grid",
        ),
        (["objective.regression_target_norm=global"], "must be one of none, spatial; got 'global'"),
        ([SPATIAL, "objective.regression_mean_share=1.5"], "must be at most 1, got 1.5"),
    ],
)
def test_contradictions_are_one_line(overrides, message):
    with pytest.raises(SettingsError) as raised:
        load_recipe("tiny", overrides)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_share_without_normalisation_is_a_warning():
    recipe = load_recipe("tiny", ["objective.regression_mean_share=0.5"])
    assert any("regression_mean_share is 0.5" in line for line in warnings_of_recipe(recipe))
    neutral = load_recipe("tiny", [SPATIAL, "objective.regression_mean_share=0.5"])
    assert not any("regression_mean_share" in line for line in warnings_of_recipe(neutral))
