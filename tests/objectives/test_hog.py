"""The target by program: which way edges run, how strong they are, and nothing for a flat patch."""

import dense
import numpy as np
import pytest

from uno_ds.objectives.hog import FLAT, ORIENTATIONS, WIDTH, hog_features

HISTOGRAM = ORIENTATIONS + 1


def parts(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(histograms [P, 3, 10], contrasts [P, 3])."""
    assert features.shape[1] == WIDTH
    return features[:, : 3 * HISTOGRAM].reshape(-1, 3, HISTOGRAM), features[:, 3 * HISTOGRAM :]


def stripes(angle: float, amplitude: float = 0.8) -> np.ndarray:
    """Waves whose gradient points along `angle`, the same in all colours."""
    rows, columns = np.mgrid[:24, :24]
    along = np.cos(angle) * columns + np.sin(angle) * rows
    plane = amplitude * np.sin(along * 0.5)
    return np.stack([plane] * 3).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 12, 9), (3, 4, 4), (3, 8, 16)])
def test_it_equals_a_loop_over_pixels(shape):
    pixels = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    for patch in (side for side in (3, 4) if shape[1] % side == 0 and shape[2] % side == 0):
        wanted = dense._hog(pixels, patch).numpy()
        got = hog_features(pixels, patch)
        assert got.dtype == np.float32 and got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("number", range(ORIENTATIONS))
def test_stripes_vote_for_their_own_orientation(number):
    histograms, _ = parts(hog_features(stripes(number * np.pi / ORIENTATIONS), 8))
    # At the image's edge differences are one-sided.
    assert (histograms[4].argmax(axis=1) == number).all()
    np.testing.assert_allclose(np.linalg.norm(histograms, axis=2), 1, rtol=1e-6)


def test_a_gradient_and_its_opposite_are_one_orientation():
    pixels = stripes(0.7)
    np.testing.assert_allclose(hog_features(pixels, 8), hog_features(-pixels, 8), atol=1e-5)


def test_a_flat_patch_has_the_flat_bin_and_no_contrast():
    histograms, contrasts = parts(hog_features(np.full((3, 16, 8), 0.3, dtype=np.float32), 8))
    assert (histograms[..., ORIENTATIONS] == 1).all() and not histograms[..., :ORIENTATIONS].any()
    assert not contrasts.any()


def test_noise_far_below_the_flat_vote_has_no_orientation_and_strong_edges_no_flat_bin():
    noise = np.random.default_rng(0).normal(0, FLAT / 50, (3, 16, 16)).astype(np.float32)
    assert parts(hog_features(noise, 8))[0][..., ORIENTATIONS].min() > 0.99
    assert parts(hog_features(stripes(0.3), 8))[0][4, :, ORIENTATIONS].max() < 0.25


def test_contrast_grows_with_the_amplitude_of_each_colour():
    pixels = stripes(0.3)
    pixels[1] *= 0.5
    _, contrasts = parts(hog_features(pixels, 8))
    np.testing.assert_allclose(contrasts[:, 1], 0.5 * contrasts[:, 0], rtol=1e-5)
    wanted = pixels[:, :8, :8].astype(np.float64).std(axis=(1, 2))
    np.testing.assert_allclose(contrasts[0], wanted, rtol=1e-6)
