"""What every row keeps more or less than AVIF at equal bytes: paired over crops, drawn by slide."""
# n crops

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from latentds_tools.fidelity.fidelity_crops import Crop

from latentds.codecs import CodecSpec, LatentSpec, latent_bytes
from latentds.evaluation.statistics import paired_images

REFERENCES = ("avif", "avif444")


def budget_of(spec: CodecSpec, card: Any, patch_px: tuple[int, int]) -> int | None:
    """Bytes a patch that a row may have, of each crop or on average; None for one at a quality."""
    if isinstance(spec, LatentSpec):
        return latent_bytes(card, patch_px, spec.quantizer)
    return spec.max_bytes or spec.mean_bytes


def columns_of(per_crop: dict[str, Any]) -> dict[str, Sequence[float | None]]:
    """What is compared: similarity by embedder, psnr_db, ssim, and the downstream figures."""
    columns = {f"similarity {name}": values for name, values in per_crop["similarity"].items()}
    columns |= {name: per_crop[name] for name in ("psnr_db", "ssim")}
    return columns | per_crop.get("downstream", {})


def pair(
    per_crop: dict[str, Any], other: dict[str, Any], crops: Sequence[Crop],
    masks: dict[str, np.ndarray], rounds: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """By group and column: how much a row is above another of the same crops.

    returns  `Difference` as JSON: mean over crops, low and high of 95 % by bootstrap over slides
             (None for fewer than three), wins of n crops
    """
    slides = np.array([crop.slide for crop in crops])
    own, others = columns_of(per_crop), columns_of(other)
    return {
        group: {
            name: paired_images(
                floats(own[name])[mask], floats(others[name])[mask], slides[mask].tolist(),
                seed=seed, draws=rounds,
            ).to_json()
            for name in own
            if name in others
        }
        for group, mask in masks.items()
    }  # fmt: skip


def floats(column: Sequence[float | None]) -> np.ndarray:
    """Float64 (n,), NaN for None."""
    return np.array([np.nan if value is None else value for value in column], np.float64)


def add_differences(
    rows: Sequence[dict[str, Any]], specs: Sequence[CodecSpec], budgets: Sequence[int | None],
    crops: Sequence[Crop], masks: dict[str, np.ndarray], rounds: int, seed: int,
) -> None:  # fmt: skip
    """Put into every row at so many bytes its differences to AVIF's rows at as many, by codec."""
    for row, spec, budget in zip(rows, specs, budgets, strict=True):
        row["differences"] = {
            other["codec"]: pair(
                row["per_crop"], other["per_crop"], crops, masks, rounds, seed
            )
            for other, reference, size in zip(rows, specs, budgets, strict=True)
            if reference.name in REFERENCES and size == budget is not None and reference != spec
        }  # fmt: skip
