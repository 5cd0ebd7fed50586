"""Probes: what is there is found, what is not is at chance, and the chance is stated."""

import numpy as np
import pytest

from uno_ds.inspection.probes import FOLDS, check_probes, classify, regress, whitened_components
from uno_ds.settings import SettingsError


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_a_linear_label_is_found_and_its_interval_holds_the_score():
    x = numbers(120, 20)
    probe = classify(x, ["left" if value > 0 else "right" for value in x[:, 3]])
    assert probe is not None and probe.score > 0.85
    assert probe.low <= probe.score <= probe.high <= 1
    assert probe.high - probe.low < 0.2
    assert probe.images == 120


def test_random_labels_are_at_the_chance_that_is_reported():
    labels = np.random.default_rng(1).choice(["a", "b", "c", "d"], 400)
    probe = classify(numbers(400, 12), labels.tolist())
    commonest = max((labels == name).mean() for name in "abcd")
    assert probe is not None and probe.chance == pytest.approx(commonest)
    # Four standard deviations of 400 draws at 1/4.
    assert abs(probe.score - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    assert abs(probe.shuffled - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    assert probe.low <= probe.chance


def test_a_linear_target_is_found_and_a_random_one_is_at_0():
    x = numbers(150, 10)
    y = x @ numbers(10, 4, seed=1) + 0.1 * numbers(150, 4, seed=2)
    found, random = regress(x, y), regress(x, numbers(150, 4, seed=3))
    assert found is not None and random is not None
    # The noise has 0.01 of variance beside about 10.
    assert found.score > 0.98 and found.low <= found.score <= found.high
    assert random.score < 0.1 and abs(found.shuffled) < 0.2 and random.chance == 0


def test_more_features_than_images_do_not_make_a_random_target_predictable():
    probe = regress(numbers(40, 300), numbers(40, 3, seed=1))
    assert probe is not None and probe.score < 0.1


def test_rare_classes_and_images_without_a_label_are_left_out():
    x = numbers(60, 5)
    labels = ["a"] * 25 + ["b"] * 25 + ["rare"] * (FOLDS - 1) + [None] * (11 - FOLDS)
    probe = classify(x, labels)
    assert probe is not None and probe.images == 50 and probe.chance == 0.5
    assert classify(x[:19], labels[16:35]) is None
    assert classify(x, ["a"] * 60) is None
    assert regress(x[:19], x[:19]) is None


def test_components_are_those_of_the_fitted_images_and_have_variance_1():
    x = numbers(30, 100) * np.linspace(0, 5, 100)
    reduced = whitened_components(x)(x)
    assert reduced.shape == (30, 29)
    np.testing.assert_allclose(reduced.T @ reduced / 30, np.eye(29), atol=1e-8)
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    standard = StandardScaler().fit_transform(x)
    expected = PCA(3).fit_transform(standard)
    found = reduced[:, ::-1][:, :3] * expected.std(axis=0)
    np.testing.assert_allclose(abs(found), abs(expected), atol=1e-8)


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    check_probes()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'uno_ds\[inspect\]'") as raised:
        check_probes()
    assert "\n" not in str(raised.value)
