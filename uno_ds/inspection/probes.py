"""What can be read off a representation linearly: cross-validated probes.

Linear probes: Alain and Bengio 2016, arXiv:1610.01644. Shape suffixes: docs/notation.md."""

import importlib.util
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from uno_ds.settings import SettingsError

FOLDS, COMPONENTS, RESAMPLES = 5, 64, 1000
# Fewer images of a class than folds leave a fold without it; fewer images say nothing.
LEAST_OF_A_CLASS, LEAST_IMAGES = FOLDS, 20
ALPHAS = tuple(10.0**power for power in range(-1, 6))


@dataclass(frozen=True)
class Probe:
    """score: accuracy, or share of the variance explained (R^2), of predictions for images that
    the probe was not fitted to; low, high: its 95 % interval over resampled images; chance: the
    accuracy of always naming the commonest class, or 0; shuffled: the score of the same probe on
    labels or targets that were shuffled, if it was asked for."""

    score: float
    low: float
    high: float
    chance: float
    shuffled: float | None
    images: int

    def plain(self) -> dict[str, float | None]:
        return dict(vars(self))


def check_probes() -> None:
    """Raises SettingsError if scikit-learn is not installed."""
    specification = importlib.util.find_spec("sklearn")
    if specification is None or specification.origin is None:
        raise SettingsError(
            "--only",
            "probes needs scikit-learn, which is not installed; run `pip install "
            "'uno_ds[inspect]'`, or leave probes out.",
        )


def classify(
    x_BW: np.ndarray, labels: Sequence[str | None], seed: int = 0, shuffled: bool = True
) -> Probe | None:
    """Logistic regression on the first 64 whitened principal components of standardised features,
    fitted to four of five stratified folds and scored on the fifth. Images without a label and
    classes of fewer than 5 images are left out; None if fewer than 20 images or two classes
    remain."""
    counts = Counter(label for label in labels if label is not None)
    classes = {label for label, count in counts.items() if count >= LEAST_OF_A_CLASS}
    kept = [number for number, label in enumerate(labels) if label in classes]
    if len(classes) < 2 or len(kept) < LEAST_IMAGES:
        return None
    x_BW = x_BW[kept]
    labels_B = np.array([str(labels[number]) for number in kept])
    right_B = _predicted_classes(x_BW, labels_B, seed) == labels_B
    at_random = None
    if shuffled:
        shuffled_B = np.random.default_rng([seed, 0]).permutation(labels_B)
        predicted_B = _predicted_classes(x_BW, shuffled_B, seed)
        at_random = float((predicted_B == shuffled_B).mean())
    means = right_B[_resampled(len(kept), seed)].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Probe(
        score=float(right_B.mean()),
        low=float(low),
        high=float(high),
        chance=max(counts[label] for label in classes) / len(kept),
        shuffled=at_random,
        images=len(kept),
    )


def regress(
    x_BW: np.ndarray, y_BW: np.ndarray, seed: int = 0, shuffled: bool = True
) -> Probe | None:
    """Ridge regression of standardised features onto all columns of `y_BW`; the penalty is chosen
    within the fitted folds. R^2 is over all columns together: 1 - squared error / squared distance
    from the mean of the fitted folds. None for fewer than 20 images."""
    if len(x_BW) < LEAST_IMAGES:
        return None
    errors_B, spreads_B = _ridge_errors(x_BW, y_BW, seed)
    at_random = None
    if shuffled:
        order_B = np.random.default_rng([seed, 0]).permutation(len(y_BW))
        at_random = _r2(*_ridge_errors(x_BW, y_BW[order_B], seed))
    chosen = _resampled(len(x_BW), seed)
    values = 1 - errors_B[chosen].sum(axis=1) / spreads_B[chosen].sum(axis=1)
    low, high = np.quantile(values, [0.025, 0.975])
    return Probe(
        score=_r2(errors_B, spreads_B),
        low=float(low),
        high=float(high),
        chance=0.0,
        shuffled=at_random,
        images=len(x_BW),
    )


def _predicted_classes(x_BW: np.ndarray, labels_B: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    predicted_B = np.empty_like(labels_B)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for fitted, held_out in folds.split(x_BW, labels_B):
        reduce = whitened_components(x_BW[fitted])
        probe = LogisticRegression(max_iter=200)
        with warnings.catch_warnings():
            # A fit that has not converged after so many steps is still a probe.
            warnings.simplefilter("ignore")
            probe.fit(reduce(x_BW[fitted]), labels_B[fitted])
        predicted_B[held_out] = probe.predict(reduce(x_BW[held_out]))
    return predicted_B


def _ridge_errors(x_BW: np.ndarray, y_BW: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """([B] squared error of each image, [B] its squared distance from the fitted folds' mean)."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    errors_B, spreads_B = np.zeros(len(x_BW)), np.zeros(len(x_BW))
    for fitted, held_out in KFold(FOLDS, shuffle=True, random_state=seed).split(x_BW):
        probe = make_pipeline(StandardScaler(), RidgeCV(ALPHAS))
        probe.fit(x_BW[fitted], y_BW[fitted])
        predicted = probe.predict(x_BW[held_out]).reshape(len(held_out), -1)
        errors_B[held_out] = ((predicted - y_BW[held_out]) ** 2).sum(axis=1)
        spreads_B[held_out] = ((y_BW[held_out] - y_BW[fitted].mean(axis=0)) ** 2).sum(axis=1)
    return errors_B, spreads_B


def whitened_components(x_BW: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Makes features of the first 64 principal components of standardised `x_BW`, each with
    variance 1. From the images' inner products, which are few where features are wide."""
    mean_W, deviation_W = x_BW.mean(axis=0), x_BW.std(axis=0)
    scale_W = np.where(deviation_W > 0, deviation_W, 1.0)
    standard_BW = (x_BW - mean_W).astype(np.float64) / scale_W
    variances, vectors = np.linalg.eigh(standard_BW @ standard_BW.T)
    kept = variances > variances[-1] * 1e-10
    variances, vectors = variances[kept][-COMPONENTS:], vectors[:, kept][:, -COMPONENTS:]
    axes = standard_BW.T @ (vectors / variances) * math.sqrt(len(x_BW))
    return lambda other_BW: ((other_BW - mean_W) / scale_W) @ axes


def _r2(errors_B: np.ndarray, spreads_B: np.ndarray) -> float:
    return float(1 - errors_B.sum() / spreads_B.sum())


def _resampled(images: int, seed: int) -> np.ndarray:
    """[RESAMPLES, B]: images drawn with repetition (Efron's percentile bootstrap)."""
    return np.random.default_rng([seed, 1]).integers(images, size=(RESAMPLES, images))
