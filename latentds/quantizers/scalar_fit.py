"""Scalar codebooks fitted to latent values, by kind.

A new kind is a function here and an entry of KINDS; options, their help and codecs' names follow.
No heavy import: helps are built from it.

K-means in one dimension takes exact Lloyd steps on sorted values with prefix sums: a step costs K
binary searches however many values there are, so steps to convergence take milliseconds. Lloyd
alone stays where it started: on heavy-tailed values 1 to 4 dB short of the optimum, because no step
carries a centroid from a crowded stretch into a starving tail. `relocate` does.
"""
# M sample values, of a row, C latent channels, K levels or centroids

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from latentds.errors import ShapeError
from latentds.quantizers.scalar import MAX_LEVELS, Codebook

ITERATIONS = 20  # from the companding start; the moves that follow end where 100 would have led
TAIL = 1e-4  # share of the values that int8-percentile leaves beyond each end
LLOYD_STEPS = 3  # between two moves
FINAL_STEPS = 100
MAX_MOVES = 1000
WORTHWHILE = 0.7  # a move must cost less than this share of the distortion of the cell it splits
MAX_FIT_VALUES = 1_000_000  # a row; the distortion of 256 levels is known to 0.1 % from far fewer


@dataclasses.dataclass(frozen=True)
class ScalarKind:
    """How the levels of a row are found.

    fit      ascending float32 (M,) values and K to ascending float32 (K,) levels
    summary  for helps
    is_per_channel  a row of levels for each channel, not one for all
    is_fixed  always 256 levels: codecs' names give it none
    """

    fit: Callable[[np.ndarray, int], np.ndarray]
    summary: str
    is_per_channel: bool = False
    is_fixed: bool = True


def fit_kmeans(values: np.ndarray, levels: int) -> np.ndarray:
    """K-means centroids of ascending 1-D values, ascending.

    faiss from a companding start, then moves between cells. faiss's own start, random points, ends
    8 to 14 dB below the optimum for 256 centroids in one dimension; the start alone leaves up to 4
    dB of a heavy tail, since Lloyd steps keep the number of centroids in a stretch; the moves bring
    it to 0.4 dB.
    """
    import faiss

    distinct = np.unique(values)
    if len(distinct) <= levels:
        return np.pad(distinct, (0, levels - len(distinct)), mode="edge").astype(np.float32)
    start = companding_levels(values, levels).astype(np.float32)
    kmeans = faiss.Kmeans(
        1, levels, niter=ITERATIONS, max_points_per_centroid=len(values), min_points_per_centroid=1
    )
    kmeans.train(values.reshape(-1, 1), init_centroids=start.reshape(-1, 1))
    centroids = np.sort(np.asarray(kmeans.centroids, np.float64).reshape(-1))
    return relocate(values, centroids).astype(np.float32)


def companding_levels(values: np.ndarray, levels: int) -> np.ndarray:
    """Ascending levels spaced as an optimal compander's: density to the 1/3 (Panter and Dite 1951).

    The density is read off the gaps between ascending values, not off a histogram of even bins,
    which a heavy tail leaves empty: over a gap of width d its cube root integrates to d^(2/3).
    """
    cumulative = np.append(0.0, np.cumsum(np.diff(values.astype(np.float64)) ** (2 / 3)))
    wanted = (np.arange(levels) + 0.5) / levels * cumulative[-1]
    start: np.ndarray = np.interp(wanted, cumulative, values)
    return start


def fit_range(values: np.ndarray, levels: int) -> np.ndarray:
    """Evenly spaced levels from the smallest to the largest value, both included."""
    return np.linspace(values[0], values[-1], levels, dtype=np.float32)


def fit_percentiles(values: np.ndarray, levels: int) -> np.ndarray:
    """Evenly spaced levels over all values but a share of TAIL at each end."""
    return fit_range(np.quantile(values, [TAIL, 1 - TAIL]), levels)


KINDS = {
    "kmeans": ScalarKind(fit_kmeans, "the paper's one table of centroids", is_fixed=False),
    "kmeans-channel": ScalarKind(
        fit_kmeans, "a table a channel", is_per_channel=True, is_fixed=False
    ),
    "int8-minmax": ScalarKind(fit_range, "even levels over the range"),
    "int8-percentile": ScalarKind(fit_percentiles, "even levels over all but 1e-4 at each end"),
    "int8-channel": ScalarKind(fit_range, "even levels over each channel's", is_per_channel=True),
}


def check_kind(kind: str) -> str:
    """The kind; ValueError for one that is not in KINDS."""
    if kind not in KINDS:
        raise ValueError(f"unknown quantizer {kind!r}; known: {', '.join(KINDS)}")
    return kind


# The type of an option that names a kind.
KindName = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="KIND",
        instance_from_str=lambda words: check_kind(words[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
    tyro.conf.arg(
        help="How latents become bytes, one by one: "
        + "; ".join(f"{name}, {kind.summary}" for name, kind in KINDS.items())
        + "."
    ),
]


@dataclasses.dataclass(frozen=True)
class Cells:
    """Counts, means and summed squared errors (K,) of the values nearest to each centroid."""

    counts: np.ndarray
    means: np.ndarray
    errors: np.ndarray


class SortedValues:
    """Ascending values (M,) with the prefix sums that make a cell's mean and error O(1)."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values.astype(np.float64)
        self.sums = np.append(0.0, np.cumsum(self.values))
        self.squares = np.append(0.0, np.cumsum(np.square(self.values)))

    def cells(self, centroids: np.ndarray) -> Cells:
        """The cells of ascending centroids; an empty cell keeps its centroid as mean."""
        middle = (centroids[1:] + centroids[:-1]) / 2
        bounds = np.searchsorted(self.values, middle, side="right")
        starts, ends = np.append(0, bounds), np.append(bounds, len(self.values))
        counts = ends - starts
        sums = self.sums[ends] - self.sums[starts]
        divisor = np.maximum(counts, 1)
        means = np.where(counts > 0, sums / divisor, centroids)
        errors = self.squares[ends] - self.squares[starts] - np.square(sums) / divisor
        return Cells(counts, means, np.maximum(errors, 0.0))

    def lloyd(self, centroids: np.ndarray, steps: int) -> np.ndarray:
        """`centroids` after at most `steps` Lloyd steps."""
        for _ in range(steps):
            moved = np.sort(self.cells(centroids).means)
            if np.array_equal(moved, centroids):
                break
            centroids = moved
        return centroids


def relocate(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Centroids whose distortion on the ascending `values` is no higher, as a rule much lower.

    Repeats: merge the two neighbours whose merger costs least, split the cell that errs most. In
    the optimum all cells err alike (Gersho 1979), so the moves end when the cheapest merger costs
    what a split gains. Within 0.4 dB of the exact dynamic programme on normal, Laplace and
    Student-t (2, 3) samples.
    """
    if len(centroids) < 3:
        return SortedValues(values).lloyd(centroids, FINAL_STEPS)
    sorted_values = SortedValues(values)
    best, least = centroids, np.inf
    for _ in range(MAX_MOVES):
        centroids = sorted_values.lloyd(centroids, LLOYD_STEPS)
        cells = sorted_values.cells(centroids)
        if cells.errors.sum() < least:
            best, least = centroids, cells.errors.sum()
        left, cost = cheapest_merger(cells)
        worst = int(cells.errors.argmax())
        if cost >= WORTHWHILE * cells.errors[worst] or worst in (left, left + 1):
            break
        centroids = move(centroids, cells, left, worst)
    return sorted_values.lloyd(best, FINAL_STEPS)


def cheapest_merger(cells: Cells) -> tuple[int, float]:
    """Left index of the two neighbours whose merger raises the error least, and by how much."""
    first, second = cells.counts[:-1], cells.counts[1:]
    costs = first * second / np.maximum(first + second, 1) * np.square(np.diff(cells.means))
    left = int(costs.argmin())
    return left, float(costs[left])


def move(centroids: np.ndarray, cells: Cells, left: int, worst: int) -> np.ndarray:
    """Centroids with `left` and its right neighbour merged, and cell `worst` split at its mean."""
    moved = centroids.copy()
    pair = slice(left, left + 2)
    moved[left] = np.average(cells.means[pair], weights=np.maximum(cells.counts[pair], 1))
    spread = np.sqrt(cells.errors[worst] / cells.counts[worst]) / 2
    moved[worst] = cells.means[worst] - spread
    moved[left + 1] = cells.means[worst] + spread
    return np.sort(moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitReport:
    """What a codebook does to the sample it was fitted on.

    values           number of sample values
    mse              mean squared distance to the nearest level
    snr_db           10 log10(variance / mse)
    dead_levels      levels no sample value maps to, over all rows
    saturated_share  values beyond the outer levels by more than half the outer interval
    """

    values: int
    mse: float
    snr_db: float
    dead_levels: int
    saturated_share: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, rounded to what a sample can tell."""
        return {
            "values": self.values,
            "mse": float(f"{self.mse:.4g}"),
            "snr_db": round(self.snr_db, 2) if math.isfinite(self.snr_db) else None,
            "dead_levels": self.dead_levels,
            "saturated_share": float(f"{self.saturated_share:.3g}"),
        }


def fit_codebook(
    samples: np.ndarray, kind: str = "kmeans", levels: int = MAX_LEVELS, seed: int = 0
) -> tuple[Codebook, FitReport]:
    """A codebook for latents distributed like the sample, and what it does to them.

    samples  float32 (C, M): M values of each channel, finite
    kind     one of KINDS
    levels   K, 1 to 256
    seed     of the subsample drawn where there are more than a million values a row
    """
    how = KINDS[check_kind(kind)]
    if samples.ndim != 2 or samples.size == 0:
        raise ShapeError(f"samples have shape {samples.shape}, expected (C, M) with M > 0")
    if not np.isfinite(samples).all():
        raise ValueError("samples contain NaN or infinity; encode in float32")
    rows = samples if how.is_per_channel else samples.reshape(1, -1)
    rng = np.random.default_rng(seed)
    table = np.stack([how.fit(subsample(row, rng), levels) for row in rows])
    codebook = Codebook(table, kind)
    return codebook, report(rows, codebook)


def subsample(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At most MAX_FIT_VALUES of the values, ascending, the extremes always among them."""
    if len(values) > MAX_FIT_VALUES:
        drawn = rng.choice(values, MAX_FIT_VALUES - 2, replace=False)
        values = np.append(drawn, [values.min(), values.max()])
    return np.sort(values.astype(np.float32))


def report(rows: np.ndarray, codebook: Codebook) -> FitReport:
    """Distortion, dead levels and saturation of `codebook` on samples (R, M)."""
    squared, dead, saturated = 0.0, 0, 0
    for row, levels in zip(rows, codebook.levels, strict=True):
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, row)
        squared += float(np.square(row - levels[codes], dtype=np.float64).sum())
        dead += int((np.bincount(codes, minlength=len(levels)) == 0).sum())
        low, high = levels[0] - outer_half(levels), levels[-1] + outer_half(levels[::-1])
        saturated += int(((row < low) | (row > high)).sum())
    mse = squared / rows.size
    variance = float(rows.var(dtype=np.float64))
    return FitReport(
        values=rows.size,
        mse=mse,
        snr_db=10 * float(np.log10(variance / mse)) if mse > 0 and variance > 0 else float("inf"),
        dead_levels=dead,
        saturated_share=saturated / rows.size,
    )


def outer_half(levels: np.ndarray) -> float:
    """Half the interval between the two levels at the start of `levels`."""
    return abs(float(levels[1] - levels[0])) / 2 if len(levels) > 1 else 0.0
