"""A regression target by program: orientation histograms and local contrast of each patch.

MaskFeat (arXiv:2112.09133) predicts histograms of oriented gradients; contrast and the flat bin are
our additions. Shape suffixes: docs/notation.md."""

import numpy as np

COLOURS = 3
# Of directions without a sign, from 0 to pi.
ORIENTATIONS = 9
# A constant vote beside the orientations, in units of the gradient: a patch without structure has
# a direction too, and noise far below it none of its own.
FLAT = 0.05
WIDTH = COLOURS * (ORIENTATIONS + 1 + 1)


def hog_features(pixels_3hw: np.ndarray, patch: int) -> np.ndarray:
    """float32 [P, 33]: of each patch of `patch` x `patch` pixels, row by row, for each colour a
    histogram of 9 gradient orientations and the flat bin, of norm 1, then for each colour the
    deviation of its values. `pixels_3hw`: in [-1, 1].

    A pixel votes with the magnitude of its gradient (central differences), shared between the two
    nearest orientations."""
    pixels = pixels_3hw.astype(np.float64)
    down, across = np.gradient(pixels, axis=1), np.gradient(pixels, axis=2)
    place = np.mod(np.arctan2(down, across), np.pi) * (ORIENTATIONS / np.pi)
    lower = np.floor(place).astype(np.int64)
    share = place - lower
    magnitude = np.hypot(down, across)
    votes = np.zeros((ORIENTATIONS, *pixels.shape))
    for bins, weight in ((lower, 1 - share), (lower + 1, share)):
        for orientation in range(ORIENTATIONS):
            votes[orientation] += np.where(
                bins % ORIENTATIONS == orientation, weight * magnitude, 0
            )
    counts = _by_patch(votes.reshape(-1, *pixels.shape[1:]), patch).mean(axis=-1)
    histogram = counts.reshape(-1, ORIENTATIONS, COLOURS).transpose(0, 2, 1)
    flat = np.full((len(histogram), COLOURS, 1), FLAT)
    histogram = np.concatenate([histogram, flat], axis=2)
    histogram = histogram / np.linalg.norm(histogram, axis=2, keepdims=True)
    contrast = _by_patch(pixels, patch).std(axis=-1)
    features = np.concatenate([histogram.reshape(len(histogram), -1), contrast], axis=1)
    return features.astype(np.float32)


def _by_patch(images: np.ndarray, patch: int) -> np.ndarray:
    """[n, h, w] -> [P, n, patch * patch]."""
    channels, height, width = images.shape
    cells = images.reshape(channels, height // patch, patch, width // patch, patch)
    return cells.transpose(1, 3, 0, 2, 4).reshape(-1, channels, patch * patch)
