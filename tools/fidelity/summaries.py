"""Means, spreads, intervals of what was measured on every crop; differences paired over crops."""
# n crops, S slides, B bootstrap rounds

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from latentds_tools.fidelity.fidelity_crops import Crop

from latentds.codecs import CodecSpec, LatentSpec, latent_bytes
from latentds.evaluation.statistics import paired_images

INTERVAL = (2.5, 97.5)  # percentiles: 95 %
REFERENCES = ("avif", "avif444")  # rows that others of as many bytes are set against


class Groups:
    """The crops as a whole and by the coding of their files, with the draws of the bootstrap.

    All rows share the draws: the same slides at the same time.
    """

    def __init__(self, crops: Sequence[Crop], rounds: int, seed: int) -> None:
        kinds = np.array([crop.kind for crop in crops])
        self.masks = {"all": np.ones(len(crops), bool)}
        if len(set(kinds.tolist())) > 1:
            self.masks |= {kind: kinds == kind for kind in dict.fromkeys(kinds.tolist())}
        self.names = np.array([crop.slide for crop in crops])
        self.slides = np.unique(self.names, return_inverse=True)[1]
        self.rounds, self.seed = rounds, seed

    def counts(self) -> dict[str, dict[str, int]]:
        return {
            name: {"crops": int(mask.sum()), "slides": len(np.unique(self.slides[mask]))}
            for name, mask in self.masks.items()
        }

    def summarize(self, per_crop: dict[str, Any]) -> dict[str, Any]:
        """For every group: bytes, psnr_db, ssim, similarity by embedder, downstream by figure."""
        return {name: self.summarize_group(per_crop, mask) for name, mask in self.masks.items()}

    def summarize_group(self, per_crop: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
        slides = self.slides[mask]

        def of(column: Sequence[float | None]) -> dict[str, Any]:
            return summarize(floats(column)[mask], slides, self.rounds, self.seed)

        psnr = of(per_crop["psnr_db"])
        psnr["equal"] = int(mask.sum()) - psnr["n"]
        return {
            "bytes": float(np.mean(np.asarray(per_crop["bytes"])[mask])),
            "psnr_db": psnr,
            "ssim": of(per_crop["ssim"]),
            "similarity": {name: of(values) for name, values in per_crop["similarity"].items()},
            "downstream": {name: of(values) for name, values in per_crop["downstream"].items()},
        }

    def pair(self, per_crop: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """By group and column: how much a row is above another of the same crops.

        returns  `Difference` as JSON: mean over crops, low and high of 95 % by bootstrap over
                 slides (None for fewer than three), wins of n crops
        """
        own, others = columns_of(per_crop), columns_of(other)
        return {
            group: {
                name: paired_images(
                    own[name][mask], others[name][mask], self.names[mask].tolist(),
                    seed=self.seed, draws=self.rounds,
                ).to_json()
                for name in own
                if name in others
            }
            for group, mask in self.masks.items()
        }  # fmt: skip

    def add_differences(
        self, rows: Sequence[dict[str, Any]], specs: Sequence[CodecSpec],
        budgets: Sequence[int | None],
    ) -> None:  # fmt: skip
        """Put into every row at so many bytes its differences to AVIF's rows at as many."""
        for row, spec, budget in zip(rows, specs, budgets, strict=True):
            row["differences"] = {
                other["codec"]: self.pair(row["per_crop"], other["per_crop"])
                for other, reference, size in zip(rows, specs, budgets, strict=True)
                if reference.name in REFERENCES and size == budget is not None and reference != spec
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


def budget_of(spec: CodecSpec, card: Any, patch_px: tuple[int, int]) -> int | None:
    """Bytes a patch that a row may have, of each crop or on average; None for one at a quality."""
    if isinstance(spec, LatentSpec):
        return latent_bytes(card, patch_px, spec.quantizer)
    return spec.max_bytes or spec.mean_bytes


def columns_of(per_crop: dict[str, Any]) -> dict[str, np.ndarray]:
    """What is compared: similarity by embedder, psnr_db, ssim, and the downstream figures."""
    columns = {f"similarity {name}": values for name, values in per_crop["similarity"].items()}
    columns |= {name: per_crop[name] for name in ("psnr_db", "ssim")}
    columns |= per_crop.get("downstream", {})
    return {name: floats(values) for name, values in columns.items()}


def floats(column: Sequence[float | None]) -> np.ndarray:
    """Float64 (n,), NaN for None."""
    return np.array([np.nan if value is None else value for value in column], np.float64)
