"""CKNNA, CKA and spatial measures: hand values, independent formulas, invariances."""

import itertools
import math

import numpy as np
import pytest
import torch

from uno_ds.data.scene_drawing import BACKGROUND, KINDS, draw, make_scene
from uno_ds.inspection.alignment import cknna, linear_cka, spatial_measures, unbiased_hsic
from uno_ds.inspection.images import foreground


def features(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(features(width, width, 9)).Q


def test_cka_of_four_points_is_what_a_hand_computes():
    # Centred columns: x = (-1, 1, 0, 0), y = (-1, 1, -1, 1) / 2 per image; (x.y)^2 / (|x|^2 |y|^2).
    x = torch.tensor([[-1.0], [1.0], [0.0], [0.0]]) + 5
    y = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]) / 2
    assert linear_cka(x, y) == pytest.approx(1.0**2 / (2.0 * 1.0))


def test_cka_equals_its_feature_space_formula():
    x, y = features(30, 7, 0), features(30, 5, 1) + 2
    y[:, :3] += x[:, :3]
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-12)


def cknna_by_loops(x: torch.Tensor, y: torch.Tensor, k: int) -> float:
    """One pair of images at a time, from cosines and sorted lists of neighbours."""
    every = range(len(x))

    def cosines(z: torch.Tensor) -> list[list[float]]:
        return [[float(a @ b / (a.norm() * b.norm())) for b in z] for a in z]

    def neighbours(gram: list[list[float]]) -> list[list[int]]:
        return [sorted(set(every) - {i}, key=lambda j: -gram[i][j])[:k] for i in every]

    def kept(gram: list[list[float]], *lists: list[list[int]]) -> dict[tuple[int, int], float]:
        found = {}
        for i in every:
            shared = set.intersection(*(set(near[i]) for near in lists))
            found |= {(i, j): gram[i][j] for j in shared}
        return found

    def hsic(a: dict[tuple[int, int], float], b: dict[tuple[int, int], float]) -> float:
        n = len(x)
        opposite = sum(value * b.get((j, i), 0.0) for (i, j), value in a.items())
        totals = sum(a.values()) * sum(b.values()) / ((n - 1) * (n - 2))
        paths = sum(v * w for (_, j), v in a.items() for (q, _), w in b.items() if j == q)
        return (opposite + totals - 2 * paths / (n - 2)) / (n * (n - 3))

    gram_x, gram_y = cosines(x), cosines(y)
    near_x, near_y = neighbours(gram_x), neighbours(gram_y)
    shared = hsic(kept(gram_x, near_x, near_y), kept(gram_y, near_x, near_y))
    own_x = hsic(kept(gram_x, near_x), kept(gram_x, near_x))
    own_y = hsic(kept(gram_y, near_y), kept(gram_y, near_y))
    return shared / math.sqrt(own_x * own_y)


def test_hsic_is_the_mean_over_all_quadruples_of_different_images():
    k, l = (z @ z.T for z in (features(7, 3, 0), features(7, 2, 1)))
    pairs, triples, quadruples = [], [], []
    for i, j, q, r in itertools.permutations(range(7), 4):
        pairs.append(float(k[i, j] * l[i, j]))
        triples.append(float(k[i, j] * l[i, q]))
        quadruples.append(float(k[i, j] * l[q, r]))
    expected = (sum(pairs) - 2 * sum(triples) + sum(quadruples)) / len(pairs)
    assert unbiased_hsic(k, l) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("k", [3, 5])
def test_cknna_equals_its_formula_pair_by_pair(k):
    x, y = features(9, 4, 2), features(9, 6, 3)
    y[:, :4] += x
    assert cknna(x, y, k) == pytest.approx(cknna_by_loops(x, y, k), rel=1e-9)


@pytest.mark.parametrize("measure", [linear_cka, cknna])
def test_rotation_and_scaling_change_nothing_and_a_feature_is_aligned_with_itself(measure):
    x, y = features(60, 8, 4), features(60, 8, 5) * 0.5
    y += x
    value = measure(x, y)
    assert measure(x, x) == pytest.approx(1.0)
    assert measure(3 * x @ rotation(8), 0.1 * y) == pytest.approx(value, rel=1e-9)
    assert 0.1 < value < 0.95


def test_a_shuffled_pairing_gives_about_0():
    x = features(200, 6, 6)
    shuffled = x[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    # By chance k of n neighbours are shared.
    assert abs(cknna(x, shuffled)) < 2 * 10 / 200
    # Biased CKA of n images and d values is about d / n for unrelated features.
    assert linear_cka(x, shuffled) < 3 * 6 / 200


def test_wide_features_have_a_high_cka_whatever_they_are_of_and_no_cknna():
    """Why a report shows both of a shuffled pairing."""
    x, y = features(60, 900, 0), features(60, 900, 1)
    assert linear_cka(x, y) > 0.8 and abs(cknna(x, y)) < 2 * 10 / 60


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="10 neighbours need more than 10 images"):
        cknna(features(10, 3, 0), features(10, 3, 1))


def test_a_constant_feature_has_no_alignment():
    assert math.isnan(linear_cka(torch.ones(5, 2), features(5, 2, 0)))


def test_spatial_measures_of_two_halves_are_what_a_hand_computes():
    # 4 x 4 tokens, left half (1, 0), right half (0, 1): similarity 1 within a half, else 0.
    tokens = torch.zeros(4, 4, 2)
    tokens[:, :2, 0] = 3.0
    tokens[:, 2:, 1] = 0.5
    measures = spatial_measures(tokens.reshape(16, 2), (4, 4))
    local, decay, contrast, region = measures.tolist()
    # Neighbours: 12 vertical pairs and 8 of the 12 horizontal ones are alike. Distance >= 2
    # (6/16 of 4, at least 2): all 120 pairs less the 24 neighbours; 56 pairs are alike in all.
    assert local == pytest.approx(20 / 24 - (56 - 20) / (120 - 24), rel=1e-6)
    # Distance 1: 20 of 24 pairs alike; distance 2: 8 vertical, none of 8 horizontal, and of the 18
    # diagonal ones 12.
    assert decay == pytest.approx(20 / 24 - (8 + 12) / 34, rel=1e-6)
    # The unit tokens' mean is (1/2, 1/2), from which each is sqrt(1/2) away.
    assert contrast == pytest.approx(math.sqrt(0.5), rel=1e-6)
    assert math.isnan(region), "nothing is known of the foreground"
    # The foreground is the first row: its tokens have 1, 1/2, 1/2 and 1 of their neighbours alike,
    # and of the 11 tokens of other rows that are at least 2 away, 5.
    first_row = torch.arange(16) < 4
    *others, region = spatial_measures(tokens.reshape(16, 2), (4, 4), first_row).tolist()
    assert others == [local, decay, contrast]
    assert region == pytest.approx((1 + 0.5 + 0.5 + 1) / 4 - 5 / 11, rel=1e-6)


def test_a_foreground_token_without_both_kinds_of_pairs_does_not_count():
    tokens = features(16, 8, 3)
    # Two tokens that are neighbours, and one in the corner that has none.
    inside = torch.zeros(16, dtype=torch.bool)
    inside[[0, 1]] = True
    expected = spatial_measures(tokens, (4, 4), inside)[3]
    unit = torch.nn.functional.normalize(tokens, dim=1)
    similarity = unit @ unit.T
    # At least 2 away from token 0: all but 1 and 4; from token 1: all but 0, 2 and 5.
    far = [[n for n in range(2, 16) if n != 4], [n for n in range(3, 16) if n != 5]]
    by_hand = [similarity[0, 1] - similarity[token, far[token]].mean() for token in (0, 1)]
    assert float(expected) == pytest.approx(float(sum(by_hand) / 2), rel=1e-5)
    assert math.isnan(spatial_measures(tokens, (4, 4), torch.ones(16, dtype=torch.bool))[3])
    lone = torch.zeros(16, dtype=torch.bool)
    lone[5] = True
    assert math.isnan(spatial_measures(tokens, (4, 4), lone)[3])


def test_the_foreground_of_a_scene_is_where_its_objects_are_drawn():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        scene = make_scene(kind, rng)
        for rows, columns in ((7, 7), (3, 3)):
            pixels = np.asarray(draw(scene, rows * 24)).astype(int)
            covered = (np.abs(pixels - BACKGROUND).sum(axis=2) > 60).astype(float)
            shares = covered.reshape(rows, 24, columns, 24).mean(axis=(1, 3)).flatten()
            found = foreground(scene, (rows, columns))
            assert found is not None
            # An edge of a pixel's width is drawn otherwise.
            sure = np.abs(shares - 0.5) > 2 / 24
            assert sure.any() and (found.numpy() == (shares > 0.5))[sure].all()
    assert foreground(None, (7, 7)) is None


def test_spatial_measures_are_invariant_and_about_0_for_noise():
    tokens = features(49, 64, 7)
    inside = torch.arange(49) % 3 > 0
    plain = spatial_measures(tokens, (7, 7), inside)
    turned = spatial_measures(2 * tokens @ rotation(64), (7, 7), inside)
    torch.testing.assert_close(turned, plain)
    assert abs(plain[0]) < 0.05 and abs(plain[1]) < 0.05
    # Few pairs are of both kinds: the mean over many draws.
    regions = [spatial_measures(features(49, 64, seed), (7, 7), inside)[3] for seed in range(60)]
    assert abs(sum(regions)) / 60 < 0.02


def test_a_grid_of_one_token_has_no_neighbours():
    local, decay, contrast, _ = spatial_measures(torch.ones(1, 3), (1, 1)).tolist()
    assert math.isnan(local) and math.isnan(decay) and contrast == pytest.approx(0, abs=1e-6)
