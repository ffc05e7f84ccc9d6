"""Scores of weighted items, for many weightings at once: what a bootstrap draws again and again."""
# n items, C classes, B weightings

from __future__ import annotations

import numpy as np

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc")
CHUNK = 1 << 22  # values of a float64 array that is held at once


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
