"""Means, spreads and confidence intervals of what was measured on every crop."""
# n crops, S slides, B bootstrap rounds

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from latentds_tools.fidelity.fidelity_crops import Crop

INTERVAL = (2.5, 97.5)  # percentiles: 95 %


class Groups:
    """The crops as a whole and by the coding of their files, with the draws of the bootstrap.

    All rows share the draws: the same slides at the same time.
    """

    def __init__(self, crops: Sequence[Crop], rounds: int, seed: int) -> None:
        kinds = np.array([crop.kind for crop in crops])
        self.masks = {"all": np.ones(len(crops), bool)}
        if len(set(kinds.tolist())) > 1:
            self.masks |= {kind: kinds == kind for kind in dict.fromkeys(kinds.tolist())}
        self.slides = np.unique([crop.slide for crop in crops], return_inverse=True)[1]
        self.rounds, self.seed = rounds, seed

    def counts(self) -> dict[str, dict[str, int]]:
        """Crops and slides of every group."""
        return {
            name: {"crops": int(mask.sum()), "slides": len(np.unique(self.slides[mask]))}
            for name, mask in self.masks.items()
        }

    def summarize(self, per_crop: dict[str, Any]) -> dict[str, Any]:
        """For every group: bytes, psnr_db, ssim, similarity by embedder, downstream by figure."""
        return {name: self.summarize_group(per_crop, mask) for name, mask in self.masks.items()}

    def summarize_group(self, per_crop: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
        """The figures of one group."""
        slides = self.slides[mask]

        def of(column: Sequence[float | None]) -> dict[str, Any]:
            values = np.array([np.nan if v is None else v for v in column], np.float64)[mask]
            return summarize(values, slides, self.rounds, self.seed)

        psnr = of(per_crop["psnr_db"])
        psnr["equal"] = int(mask.sum()) - psnr["n"]
        return {
            "bytes": float(np.mean(np.asarray(per_crop["bytes"])[mask])),
            "psnr_db": psnr,
            "ssim": of(per_crop["ssim"]),
            "similarity": {name: of(values) for name, values in per_crop["similarity"].items()},
            "downstream": {name: of(values) for name, values in per_crop["downstream"].items()},
        }


def summarize(values: np.ndarray, slides: np.ndarray, rounds: int, seed: int) -> dict[str, Any]:
    """Mean, sd (n - 1), 5th percentile, n and ci95 of the values that are not NaN; None for none.

    values  float64 (n,)
    slides  int (n,), which slide each is of
    ci95    percentile bootstrap of the mean over slides; None where there is one slide only
    """
    kept = np.isfinite(values)
    values, slides = values[kept], slides[kept]
    if not len(values):
        return {"mean": None, "sd": None, "p5": None, "n": 0, "ci95": None}
    return {
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "p5": float(np.percentile(values, 5)),
        "n": len(values),
        "ci95": confidence_interval(values, slides, rounds, seed),
    }


def confidence_interval(
    values: np.ndarray, slides: np.ndarray, rounds: int, seed: int
) -> list[float] | None:
    """Low and high end of the 95 % interval of the mean; None for a single slide or no rounds."""
    count = len(np.unique(slides))
    if count < 2 or rounds < 1:
        return None
    draws = np.random.default_rng(seed).integers(count, size=(rounds, count))
    return [float(v) for v in np.percentile(drawn_means(values, slides, draws), INTERVAL)]


def drawn_means(values: np.ndarray, slides: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Float64 (B,): the mean over all crops of the slides drawn, slides drawn twice counted twice.

    draws  int (B, S): places in the ascending list of slides
    """
    place = np.unique(slides, return_inverse=True)[1]
    sums, counts = np.bincount(place, values), np.bincount(place)
    means: np.ndarray = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    return means
