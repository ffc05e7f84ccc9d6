"""Scores of a classifier on one test set, for one weighting of its items or for many at once."""
# n items, C classes, B weightings

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from latentds.errors import InputError, ShapeError
from latentds.sources.slide_names import some

SUM_TOLERANCE = 1e-3  # rows of half-precision probabilities add up to 1 within this
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc")
CHUNK = 1 << 22  # values of a float64 array that is held at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What a classifier reached.

    values     accuracy, balanced_accuracy, macro_f1, auc in [0, 1]; None where undefined
    per_class  recall, precision, f1 in [0, 1] (None where undefined) and support, by class
    confusion  counts, truth in rows
    notes      why something is undefined or left out, in sentences
    """

    values: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    confusion: list[list[int]]
    notes: list[str]


def classification_scores(
    labels: Sequence[int] | np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> Scores:
    """Scores of probabilities against labels; predictions are the most probable classes.

    labels         int (n,) in 0..C-1
    probabilities  float (n, C), rows add up to 1
    returns        `auc` of class 1 where there are two classes, else the mean one against rest over
                   the classes that have items. It is None where only one class has items.
    raises         ShapeError; InputError for no items, labels out of range, or probabilities that
                   are not finite or do not add up to 1
    source         the definitions of scikit-learn's metrics of the same names
    """
    targets, values = np.asarray(labels, np.int64), np.asarray(probabilities, np.float64)
    check_predictions(targets, values, classes)
    ones = np.ones((1, len(targets)))
    counts = confusions(targets, values, ones)[0].astype(np.int64)
    found = {name: float(weighted_score(name, targets, values, ones)[0]) for name in METRICS}
    support = counts.sum(axis=1)
    return Scores(
        values={name: None if np.isnan(value) else value for name, value in found.items()},
        per_class=per_class_scores(counts, classes),
        confusion=counts.tolist(),
        notes=describe_missing(
            [c for c, n in zip(classes, support, strict=True) if not n], classes
        ),
    )


def describe_missing(absent: Sequence[str], classes: Sequence[str]) -> list[str]:
    """What follows from classes that a test set has no item of."""
    if not absent:
        return []
    if len(classes) - len(absent) < 2:
        (only,) = set(classes) - set(absent)
        return [f"all test items are of class {only!r}: no AUC"]
    return [f"no test item of class {some(list(absent))}: left out of the means over classes"]


def check_predictions(
    targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> None:
    if targets.ndim != 1 or probabilities.shape != (len(targets), len(classes)):
        raise ShapeError(
            f"probabilities {probabilities.shape} for labels {targets.shape} of {len(classes)} "
            "classes"
        )
    if len(classes) < 2 or not len(targets):
        raise InputError(f"{len(targets)} items of {len(classes)} classes cannot be scored")
    if targets.min() < 0 or targets.max() >= len(classes):
        raise InputError(
            f"labels from {targets.min()} to {targets.max()} for {len(classes)} classes"
        )
    if not np.isfinite(probabilities).all():
        rows = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
        raise InputError(f"probabilities of {len(rows):,} items are not finite, first {rows[0]}")
    sums = probabilities.sum(axis=1)
    if probabilities.min() < 0 or np.abs(sums - 1).max() > SUM_TOLERANCE:
        raise InputError(
            f"probabilities from {probabilities.min():.3g}, rows that add up to "
            f"{sums.min():.3g} to {sums.max():.3g}; pass probabilities, not logits"
        )


def per_class_scores(
    counts: np.ndarray, classes: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for number, name in enumerate(classes):
        hits = int(counts[number, number])
        support, predicted = int(counts[number].sum()), int(counts[:, number].sum())
        found[name] = {
            "recall": ratio(hits, support),
            "precision": ratio(hits, predicted),
            "f1": ratio(2 * hits, support + predicted),
            "support": support,
        }
    return found


def ratio(part: int, whole: int) -> float | None:
    """None for a part of nothing."""
    return part / whole if whole else None


def weighted_score(
    metric: str, labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Float64 (B,): a metric under every weighting, NaN where it is undefined.

    metric         one of METRICS
    labels         int64 (n,) in 0..C-1
    probabilities  float64 (n, C)
    weights        (B, n), not negative; whole numbers for items drawn so many times
    """
    step = max(1, CHUNK // max(1, len(labels)))
    found = []
    for start in range(0, len(weights), step):
        part = np.asarray(weights[start : start + step], np.float64)
        if metric == "auc":
            found.append(weighted_auc(labels, probabilities, part))
        else:
            found.append(score_confusions(metric, confusions(labels, probabilities, part)))
    return np.concatenate(found)


def confusions(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights (B, C, C) of the items of every true (row) and predicted class."""
    classes = probabilities.shape[1]
    cells = labels * classes + probabilities.argmax(axis=1)
    counts = np.zeros((len(weights), classes * classes))
    for cell in np.unique(cells):
        counts[:, cell] = weights[:, cells == cell].sum(axis=1)
    return counts.reshape(-1, classes, classes)


def score_confusions(metric: str, counts: np.ndarray) -> np.ndarray:
    """Float64 (B,) of confusion counts (B, C, C), truth in rows; NaN where undefined.

    Classes without items count in no mean of recalls, those without items and predictions in no
    mean of F1: as in scikit-learn.
    """
    hits = np.diagonal(counts, axis1=1, axis2=2)
    truth, predicted = counts.sum(axis=2), counts.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        if metric == "accuracy":
            return np.asarray(hits.sum(axis=1) / truth.sum(axis=1))
        if metric == "balanced_accuracy":
            return mean_where(hits / truth, truth > 0)
        return mean_where(2 * hits / (truth + predicted), truth + predicted > 0)


def mean_where(values: np.ndarray, is_counted: np.ndarray) -> np.ndarray:
    """Means over the last axis of what counts; NaN where nothing does."""
    with np.errstate(invalid="ignore"):
        sums = np.where(is_counted, values, 0.0).sum(axis=1)
        return np.asarray(sums / is_counted.sum(axis=1))


def weighted_auc(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (B,): class 1 of two, else the mean of each against the rest.

    NaN where a class that has items gets no weight, or all the weight.
    """
    present = np.unique(labels)
    if len(present) < 2:
        return np.full(len(weights), np.nan)
    positive = [1] if probabilities.shape[1] == 2 else present.tolist()
    areas = [binary_auc(labels == c, probabilities[:, c], weights) for c in positive]
    return np.asarray(np.mean(areas, axis=0))


def binary_auc(is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Probability (B,) that a positive item scores above a negative one, ties counted half."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # of equal scores
    positive = np.add.reduceat(weights[:, order] * is_positive[order], starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * ~is_positive[order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - 0.5 * negative
    with np.errstate(invalid="ignore"):
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        return np.asarray((positive * below).sum(axis=1) / pairs)
