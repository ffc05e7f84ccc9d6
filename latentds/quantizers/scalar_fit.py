"""Fit scalar codebooks to latent values, and say what they do to them."""
# M sample values, C latent channels, K levels

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from latentds.errors import ShapeError
from latentds.quantizers.scalar import MAX_LEVELS, Codebook
from latentds.quantizers.scalar_kinds import KINDS, check_kind

MAX_FIT_VALUES = 1_000_000  # a row; the distortion of 256 levels is known to 0.1 % from far fewer


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
    kind     one of `scalar_kinds.KINDS`
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
