"""Scores of a classifier on one test set, undefined ones with their reason."""
# n items, C classes

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from latentds.errors import InputError, ShapeError
from latentds.evaluation.weighing import METRICS, weighted_score
from latentds.sources.slide_names import some

SUM_TOLERANCE = 1e-3  # rows of half-precision probabilities add up to 1 within this


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
    counts = count_confusions(targets, values.argmax(axis=1), len(classes))
    ones = np.ones((1, len(targets)))
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
    """Refuse what no score can be computed from."""
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


def count_confusions(targets: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Int64 (C, C): how often a class (row) was taken for another (column)."""
    cells = np.bincount(targets * classes + predicted, minlength=classes * classes)
    return cells.reshape(classes, classes)


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
