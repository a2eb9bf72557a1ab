"""Linear and nearest-neighbour probes on frozen features. Fitted and judged on different patients, always.

A probe that the data cannot support is not measured, and says why.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from dinoct.data.index import SliceIndex

Figures = dict[str, dict[str, float] | str]  # by encoder; or "not_measured": why
MIN_SERIES = 10  # slices, for a position in it to mean something
NEIGHBOURS = 20
FOLDS = 5


def linear_classifier(*, balanced: bool) -> Pipeline:
    """Logistic regression on standardised features; `balanced`: classes weigh alike, however rare."""
    weights = "balanced" if balanced else None
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3, class_weight=weights))


def relative_position(index: SliceIndex) -> np.ndarray:
    """Place of each slice in its series, 0 at its lowest and 1 at its highest z; NaN in series under 10 slices."""
    position = np.full(len(index), np.nan)
    order = np.lexsort((index.z_mm, index.series))
    starts = np.flatnonzero(np.r_[True, np.diff(index.series[order]) != 0, True])
    for start, end in pairwise(starts):
        if end - start >= MIN_SERIES:
            position[order[start:end]] = np.linspace(0.0, 1.0, end - start)
    return position


def position_probe(
    fit: Mapping[str, np.ndarray], fit_target: np.ndarray, judged: Mapping[str, np.ndarray], target: np.ndarray
) -> Figures:
    """How well a slice's place along the body can be read from its features, on patients that the probe never saw.

    Args:
        fit, judged: features ``[n, D]`` by encoder; targets ``[n]`` in 0..1, NaN where unknown.
    Returns:
        Coefficient of determination, mean absolute error (share of the series) and Spearman's rank correlation.
    """
    known, judge = ~np.isnan(fit_target), ~np.isnan(target)
    if known.sum() < MIN_SERIES or judge.sum() < MIN_SERIES:
        return {"not_measured": f"no series of {MIN_SERIES} slices on one of the two sides"}
    result: Figures = {}
    for name, features in fit.items():
        model = make_pipeline(StandardScaler(), Ridge(alpha=10.0)).fit(features[known], fit_target[known])
        got, truth = model.predict(judged[name][judge]), target[judge]
        residual = float(np.square(got - truth).sum() / np.square(truth - truth.mean()).sum())
        varies = np.ptp(got) > 0 and np.ptp(truth) > 0
        correlation = float(spearmanr(got, truth).statistic) if varies else 0.0
        result[name] = {
            "r2": 1 - residual,
            "mean_absolute_error": float(np.abs(got - truth).mean()),
            "spearman": correlation,
        }
    return result


def shortcut_probe(features: Mapping[str, np.ndarray], classes: Sequence[str], patients: np.ndarray) -> Figures:
    """How well a property of the scanner can be read from the features: up is bad.

    Cross-validated with each patient on one side. A class that only one patient has is his fingerprint and not the
    scanner's, and is left out.

    Args:
        features: ``[n, D]`` by encoder.
        classes: vendor or kernel of each slice, empty where unknown.
        patients: ``[n]`` code of each slice's patient.
    Returns:
        Balanced accuracy and its chance level.
    """
    names = np.array(classes)
    known = [name for name in np.unique(names) if name and len(np.unique(patients[names == name])) >= 2]
    if len(known) < 2:
        return {"not_measured": "fewer than two classes with two patients each"}
    use = np.isin(names, known)
    folds = min(FOLDS, *(len(np.unique(patients[names == name])) for name in known))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    result: Figures = {}
    for name, x in features.items():
        got = cross_val_predict(linear_classifier(balanced=True), x[use], names[use], groups=patients[use], cv=splitter)
        result[name] = {
            "balanced_accuracy": float(balanced_accuracy_score(names[use], got)),
            "chance": 1 / len(known),
        }
    return result


def label_probes(
    fit: Mapping[str, np.ndarray], fit_codes: np.ndarray, judged: Mapping[str, np.ndarray], codes: np.ndarray
) -> Figures:
    """Nearest neighbours (20, cosine) and a linear layer on a table of labels.

    Args:
        fit, judged: features ``[n, D]`` by encoder; codes ``[n]``, -1 where a slice has no label.
    Returns:
        Balanced accuracies, and the linear layer's area under the ROC curve where there are two classes.
    """
    known, judge = fit_codes >= 0, codes >= 0
    shared = np.intersect1d(fit_codes[known], codes[judge])
    if len(shared) < 2:
        return {"not_measured": "fewer than two labels that occur on both sides of the split"}
    known, judge = np.isin(fit_codes, shared), np.isin(codes, shared)
    result: Figures = {}
    for name, features in fit.items():
        x, y, x2, y2 = features[known], fit_codes[known], judged[name][judge], codes[judge]
        nearest = KNeighborsClassifier(min(NEIGHBOURS, len(x)), weights="distance").fit(normalize(x), y)
        linear = linear_classifier(balanced=True).fit(x, y)
        result[name] = {
            "knn_balanced_accuracy": float(balanced_accuracy_score(y2, nearest.predict(normalize(x2)))),
            "linear_balanced_accuracy": float(balanced_accuracy_score(y2, linear.predict(x2))),
        }
        if len(shared) == 2:
            result[name]["linear_auroc"] = float(roc_auc_score(y2, linear.decision_function(x2)))
    return result


def series_purity(features: Mapping[str, np.ndarray], series: np.ndarray, k: int = 10) -> Figures:
    """Share of a slice's k nearest neighbours (cosine) that are of its own series, and what chance gives.

    High: the features know the scan; low: they know the anatomy, or nothing.
    """
    n = len(series)
    if n <= k or len(np.unique(series)) < 2:
        return {"not_measured": f"fewer than {k + 1} slices, or one series alone"}
    counts = np.unique(series, return_counts=True)[1]
    chance = float((counts * (counts - 1)).sum() / (n * (n - 1)))
    result: Figures = {}
    for name, x in features.items():
        unit = normalize(x)
        same = []
        for start in range(0, n, 1024):
            similarity = unit[start : start + 1024] @ unit.T
            similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))] = -np.inf
            nearest = np.argpartition(-similarity, k, axis=1)[:, :k]
            same.append(series[nearest] == series[start : start + 1024, None])
        result[name] = {"purity": float(np.concatenate(same).mean()), "chance": chance}
    return result
