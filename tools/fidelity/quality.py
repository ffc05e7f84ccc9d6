"""SSIM, and the similarity of embeddings."""
# B batch, D embedding dimensions, H W pixels, n pixels of a window's edge

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from latentds.errors import ShapeError

PEAK = 255
SMALL = ((0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2)  # Wang et al. 2004: keep quotients from 0 / 0
SIGMA, REACH = 1.5, 5  # of their Gaussian window, pixels

SSIM_SETTINGS = (
    "Gaussian window with sigma 1.5 (11x11), population covariance, mean over RGB channels, data "
    "range 255 (Wang et al. 2004)"
)
PSNR_SETTINGS = "8-bit RGB, data range 255, from the squared error of all three channels of a patch"
SIMILARITY_SETTINGS = (
    "cosine of the embeddings of the original and of the reconstruction rounded to 8 bits"
)


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """SSIM of uint8 (H, W, 3) pictures as Wang et al. 2004, mean over all windows within them.

    Gaussian window of 11x11, sigma 1.5, population covariance, mean over channels.
    raises  ShapeError for pictures smaller than a window
    """
    weights = np.exp(-np.square(np.arange(-REACH, REACH + 1)) / (2 * SIGMA**2))
    weights /= weights.sum()
    if min(image.shape[:2]) < len(weights):
        raise ShapeError(
            f"SSIM of a picture of {image.shape[1]}x{image.shape[0]} px; its window is "
            f"{len(weights)} px, take larger pictures"
        )
    a, b = image.astype(np.float64), reference.astype(np.float64)
    maps = [window_means(values, weights) for values in (a, b, a * a, b * b, a * b)]
    mean_a, mean_b, square_a, square_b, product = maps
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    above = (2 * mean_a * mean_b + SMALL[0]) * (2 * covariance + SMALL[1])
    below = (mean_a**2 + mean_b**2 + SMALL[0]) * (variances + SMALL[1])
    return float((above / below).mean())


def window_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means (H - n + 1, W - n + 1, 3) of the windows within values (H, W, 3)."""
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(values, len(weights), axis)
        values = windows @ weights
    return values


def to_images(pictures: Sequence[np.ndarray]) -> Any:
    """Float tensor (B, 3, H, W) in [0, 1] of uint8 pictures."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(255)


def embed(embedder: Any, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Embeddings float32 (B, D) of uint8 pictures."""
    with torch.no_grad():
        embeddings: np.ndarray = embedder.embed(to_images(pictures)).float().cpu().numpy()
    return embeddings


def cosines(embeddings: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Cosine similarity (B,) of embeddings (B, D), never above 1; 1 for two of all zeros."""
    a, b = embeddings.astype(np.float64), references.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    equal = (a == b).all(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.where(norms == 0, 0.0, (a * b).sum(axis=1) / norms)
    return np.where(equal, 1.0, np.clip(values, -1.0, 1.0))
