"""Fit codebooks to latent values: K-means by faiss, and evenly spaced int8 as baselines."""
# M sample values, C latent channels, K levels

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from latentds.core.lloyd import relocate
from latentds.errors import ShapeError
from latentds.quantizers.scalar import MAX_LEVELS, Codebook

KINDS = ("kmeans", "kmeans-channel", "int8-minmax", "int8-percentile", "int8-channel")
PER_CHANNEL = ("kmeans-channel", "int8-channel")
ITERATIONS = 20  # from the companding start; the moves that follow end where 100 would have led
MAX_FIT_VALUES = 1_000_000  # a row; the distortion of 256 levels is known to 0.1 % from far fewer
TAIL = 1e-4  # share of the values that int8-percentile leaves beyond each end


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
    kind     kmeans (one table, as in the paper), kmeans-channel (one a channel), int8-minmax,
             int8-channel, int8-percentile (evenly spaced levels over the range, over that of each
             channel, or over all but 1e-4 at each end)
    levels   K, 1 to 256
    seed     of the subsample drawn where there are more than a million values a row
    """
    if kind not in KINDS:
        raise ValueError(f"unknown quantizer {kind!r}; known: {', '.join(KINDS)}")
    if samples.ndim != 2 or samples.size == 0:
        raise ShapeError(f"samples have shape {samples.shape}, expected (C, M) with M > 0")
    if not np.isfinite(samples).all():
        raise ValueError("samples contain NaN or infinity; encode in float32")
    rows = samples if kind in PER_CHANNEL else samples.reshape(1, -1)
    rng = np.random.default_rng(seed)
    table = np.stack([fit_row(subsample(row, rng), kind, levels) for row in rows])
    codebook = Codebook(table, kind)
    return codebook, report(rows, codebook)


def subsample(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At most MAX_FIT_VALUES of the values, ascending, the extremes always among them."""
    if len(values) > MAX_FIT_VALUES:
        drawn = rng.choice(values, MAX_FIT_VALUES - 2, replace=False)
        values = np.append(drawn, [values.min(), values.max()])
    return np.sort(values.astype(np.float32))


def fit_row(values: np.ndarray, kind: str, levels: int) -> np.ndarray:
    """Ascending float32 (K,) levels for ascending values (M,)."""
    if kind in ("int8-minmax", "int8-channel"):
        return even_levels(values[0], values[-1], levels)
    if kind == "int8-percentile":
        low, high = np.quantile(values, [TAIL, 1 - TAIL])
        return even_levels(low, high, levels)
    return fit_kmeans(values, levels)


def even_levels(low: float, high: float, levels: int) -> np.ndarray:
    """Evenly spaced levels from `low` to `high`, both included."""
    return np.linspace(low, high, levels, dtype=np.float32)


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
