"""What can be read off a representation linearly: cross-validated probes.

Shape suffixes: docs/notation.md; here N counts images and F values of a feature. Linear probes:
Alain and Bengio 2016, arXiv:1610.01644."""

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
    x_NF: np.ndarray, labels: Sequence[str | None], seed: int = 0, shuffled: bool = True
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
    x_NF = x_NF[kept]
    labels_N = np.array([str(labels[number]) for number in kept])
    right_N = _predicted_classes(x_NF, labels_N, seed) == labels_N
    at_random = None
    if shuffled:
        shuffled_N = np.random.default_rng([seed, 0]).permutation(labels_N)
        predicted_N = _predicted_classes(x_NF, shuffled_N, seed)
        at_random = float((predicted_N == shuffled_N).mean())
    means = right_N[_resampled(len(kept), seed)].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Probe(
        score=float(right_N.mean()),
        low=float(low),
        high=float(high),
        chance=max(counts[label] for label in classes) / len(kept),
        shuffled=at_random,
        images=len(kept),
    )


def regress(
    x_NF: np.ndarray, y_NF: np.ndarray, seed: int = 0, shuffled: bool = True
) -> Probe | None:
    """Ridge regression of standardised features onto all columns of `y_NF`; the penalty is chosen
    within the fitted folds. R^2 is over all columns together: 1 - squared error / squared distance
    from the mean of the fitted folds. None for fewer than 20 images."""
    if len(x_NF) < LEAST_IMAGES:
        return None
    errors_N, spreads_N = _ridge_errors(x_NF, y_NF, seed)
    at_random = None
    if shuffled:
        order_N = np.random.default_rng([seed, 0]).permutation(len(y_NF))
        at_random = _r2(*_ridge_errors(x_NF, y_NF[order_N], seed))
    chosen = _resampled(len(x_NF), seed)
    values = 1 - errors_N[chosen].sum(axis=1) / spreads_N[chosen].sum(axis=1)
    low, high = np.quantile(values, [0.025, 0.975])
    return Probe(
        score=_r2(errors_N, spreads_N),
        low=float(low),
        high=float(high),
        chance=0.0,
        shuffled=at_random,
        images=len(x_NF),
    )


def _predicted_classes(x_NF: np.ndarray, labels_N: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    predicted_N = np.empty_like(labels_N)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for fitted, held_out in folds.split(x_NF, labels_N):
        reduce = whitened_components(x_NF[fitted])
        probe = LogisticRegression(max_iter=200)
        with warnings.catch_warnings():
            # A fit that has not converged after so many steps is still a probe.
            warnings.simplefilter("ignore")
            probe.fit(reduce(x_NF[fitted]), labels_N[fitted])
        predicted_N[held_out] = probe.predict(reduce(x_NF[held_out]))
    return predicted_N


def _ridge_errors(x_NF: np.ndarray, y_NF: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """([N] squared error of each image, [N] its squared distance from the fitted folds' mean)."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    errors_N, spreads_N = np.zeros(len(x_NF)), np.zeros(len(x_NF))
    for fitted, held_out in KFold(FOLDS, shuffle=True, random_state=seed).split(x_NF):
        probe = make_pipeline(StandardScaler(), RidgeCV(ALPHAS))
        probe.fit(x_NF[fitted], y_NF[fitted])
        predicted = probe.predict(x_NF[held_out]).reshape(len(held_out), -1)
        errors_N[held_out] = ((predicted - y_NF[held_out]) ** 2).sum(axis=1)
        spreads_N[held_out] = ((y_NF[held_out] - y_NF[fitted].mean(axis=0)) ** 2).sum(axis=1)
    return errors_N, spreads_N


def whitened_components(x_NF: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Makes features of the first 64 principal components of standardised `x_NF`, each with
    variance 1. From the images' inner products, which are few where features are wide."""
    mean_F, deviation_F = x_NF.mean(axis=0), x_NF.std(axis=0)
    scale_F = np.where(deviation_F > 0, deviation_F, 1.0)
    standard_NF = (x_NF - mean_F).astype(np.float64) / scale_F
    variances, vectors = np.linalg.eigh(standard_NF @ standard_NF.T)
    kept = variances > variances[-1] * 1e-10
    variances, vectors = variances[kept][-COMPONENTS:], vectors[:, kept][:, -COMPONENTS:]
    axes = standard_NF.T @ (vectors / variances) * math.sqrt(len(x_NF))
    return lambda other_NF: ((other_NF - mean_F) / scale_F) @ axes


def _r2(errors_N: np.ndarray, spreads_N: np.ndarray) -> float:
    return float(1 - errors_N.sum() / spreads_N.sum())


def _resampled(images: int, seed: int) -> np.ndarray:
    """[RESAMPLES, N]: images drawn with repetition (Efron's percentile bootstrap)."""
    return np.random.default_rng([seed, 1]).integers(images, size=(RESAMPLES, images))
