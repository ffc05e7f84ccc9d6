"""Means over folds, and differences of two runs over the same folds with bootstrap intervals."""
# n folds or predictions, G groups, B draws

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from latentds.errors import InputError
from latentds.evaluation.predictions import Predictions
from latentds.evaluation.scores import CHUNK, weighted_score

INTERVAL = (2.5, 97.5)  # percentiles: 95 %
FOLD_DRAWS, GROUP_DRAWS = 10_000, 2_000
LEAST = 3  # folds or groups that an interval is of: two say next to nothing of a spread


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (ddof 1) of `n` values; None where there are too few."""

    mean: float | None
    sd: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much the first of two runs is above the second.

    low, high  95 % percentile bootstrap interval; None for fewer than three folds or groups
    wins       folds in which the first is above, `ties` those in which both are equal, of `n`
    unit       what was drawn: folds or groups
    counted    what n counts: folds, or images
    draws      how many the interval is of
    """

    mean: float | None
    low: float | None
    high: float | None
    wins: int
    ties: int
    n: int
    unit: str = "folds"
    draws: int = 0
    counted: str = "folds"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def summary(values: Iterable[float | None]) -> Summary:
    """Of the values that are defined."""
    kept = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not kept:
        return Summary(None, None, 0)
    sd = float(np.std(kept, ddof=1)) if len(kept) > 1 else None
    return Summary(float(np.mean(kept)), sd, len(kept))


def paired_difference(
    first: Sequence[float | None],
    second: Sequence[float | None],
    *,
    seed: int,
    draws: int = FOLD_DRAWS,
) -> Difference:
    """First minus second over the same folds, with a bootstrap over folds.

    first, second  a score of every fold, in the same order; folds where either is None are left out
    raises         InputError where they are not equally many
    source         percentile bootstrap, Efron and Tibshirani 1993. Folds share training items, so
                   the interval is of these folds and narrower than one of new patients would be.
    """
    if len(first) != len(second):
        raise InputError(f"{len(first)} folds against {len(second)}; pairs need the same folds")
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    found = np.array([a - b for a, b in pairs])
    means = np.empty(0)
    if len(found) >= LEAST and draws:
        picks = np.random.default_rng(seed).integers(len(found), size=(draws, len(found)))
        means = found[picks].mean(axis=1)
    return difference_of(found, means, "folds")


def difference_of(
    found: np.ndarray, means: np.ndarray, unit: str, counted: str = "folds"
) -> Difference:
    """The record of differences and of the drawn means; None for the mean of none."""
    kept = means[np.isfinite(means)]
    low, high = np.percentile(kept, INTERVAL).tolist() if len(kept) else (None, None)
    return Difference(
        mean=float(found.mean()) if len(found) else None,
        low=low,
        high=high,
        wins=int((found > 0).sum()),
        ties=int((found == 0).sum()),
        n=len(found),
        unit=unit,
        draws=len(kept),
        counted=counted,
    )


def paired_bootstrap_groups(
    first: Predictions,
    second: Predictions,
    metric: str,
    *,
    seed: int,
    draws: int = GROUP_DRAWS,
) -> Difference:
    """First minus second, mean over folds, with a bootstrap over groups (patients).

    Groups are drawn with replacement from those of all test sets; a fold's score counts a group's
    items as often as it was drawn. Folds in which a draw leaves the metric undefined are left out
    of that draw's mean.

    metric  accuracy, balanced_accuracy, macro_f1 or auc
    raises  InputError where the two are not of the same test items
    """
    one, two = first.sorted(), second.sorted()
    check_same_items(one, two)
    names, places = np.unique(np.array(one.groups), return_inverse=True)
    cells = list(fold_rows(one))
    found = cell_differences(one, two, metric, cells, np.ones((1, len(one))))[:, 0]
    found = found[np.isfinite(found)]
    means = [np.empty(0)]
    if len(names) >= LEAST and len(found):
        for counts in drawn_counts(len(names), len(one), draws, seed):
            values = cell_differences(one, two, metric, cells, counts[:, places])
            is_defined = np.isfinite(values)
            with np.errstate(invalid="ignore"):
                sums = np.where(is_defined, values, 0).sum(axis=0)
                means.append(sums / is_defined.sum(axis=0))
    return difference_of(found, np.concatenate(means), "groups")


def paired_images(
    first: np.ndarray,
    second: np.ndarray,
    groups: Sequence[str],
    *,
    seed: int,
    draws: int = GROUP_DRAWS,
) -> Difference:
    """Mean over images of first minus second, with a bootstrap over groups (patients).

    first, second  float64 (n,): a score of every image; those where either is NaN are left out
    groups         of every image
    """
    is_both = np.isfinite(first) & np.isfinite(second)
    found = (first - second)[is_both]
    names, places = np.unique(np.array(groups)[is_both], return_inverse=True)
    means = [np.empty(0)]
    if len(names) >= LEAST:
        sums, sizes = np.bincount(places, found), np.bincount(places)
        for counts in drawn_counts(len(names), len(names), draws, seed):
            means.append((counts @ sums) / (counts @ sizes))
    return difference_of(found, np.concatenate(means), "groups", "images")


def check_same_items(one: Predictions, two: Predictions) -> None:
    """InputError unless both predict the same items of the same folds, labels and groups."""
    compared = ("items", "groups", "classes", "folds", "seeds", "labels")
    if not all(np.array_equal(getattr(one, name), getattr(two, name)) for name in compared):
        raise InputError(
            "the two runs' predictions are of other items, folds, seeds, labels or groups"
        )


def fold_rows(predictions: Predictions) -> Iterator[np.ndarray]:
    pairs = np.stack([predictions.folds, predictions.seeds], axis=1)
    cells = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    for cell in range(int(cells.max()) + 1):
        yield np.flatnonzero(cells == cell)


def cell_differences(
    one: Predictions,
    two: Predictions,
    metric: str,
    cells: Sequence[np.ndarray],
    weights: np.ndarray,
) -> np.ndarray:
    """Differences (folds and seeds, B) under weights (B, n) of the items; NaN where undefined."""

    def score(run: Predictions, rows: np.ndarray) -> np.ndarray:
        return weighted_score(metric, run.labels[rows], run.probabilities[rows], weights[:, rows])

    return np.stack([score(one, rows) - score(two, rows) for rows in cells])


def drawn_counts(groups: int, items: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each group is drawn, int64 (some of B, G), a bounded part at a time."""
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK // max(groups, items))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        yield generator.multinomial(groups, np.full(groups, 1 / groups), size=size)
