"""PSNR and SSIM of uint8 pictures, as scikit-image has them; what coding loses of latents."""
# H W pixels, n pixels of a window's edge

from __future__ import annotations

from typing import Any

import numpy as np

from latentds.errors import ShapeError

PEAK = 255
SMALL = ((0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2)  # Wang et al. 2004: keep quotients from 0 / 0
SIGMA, REACH = 1.5, 5  # of their Gaussian window, pixels


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB of uint8 (H, W, 3) pictures, peak 255; infinite for equal ones."""
    if np.array_equal(image, reference):
        return float("inf")
    error = np.square(reference.astype(np.float64) - image).mean()
    return float(10 * np.log10(PEAK**2 / error))


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """SSIM of uint8 (H, W, 3) pictures as Wang et al. 2004.

    Gaussian window of 11x11, sigma 1.5, population covariance, mean over channels.
    """
    weights = np.exp(-np.square(np.arange(-REACH, REACH + 1)) / (2 * SIGMA**2))
    return similarity(image, reference, weights / weights.sum())


def ssim_uniform(image: np.ndarray, reference: np.ndarray) -> float:
    """The same by scikit-image's defaults: a plain window of 7x7, sample covariance."""
    return similarity(image, reference, np.full(7, 1 / 7), 49 / 48)


def similarity(
    image: np.ndarray, reference: np.ndarray, weights: np.ndarray, unbiased: float = 1.0
) -> float:
    """Mean SSIM over all windows within uint8 (H, W, 3) pictures.

    weights   (n,) of a window's rows and columns, adding up to 1
    unbiased  what variances are multiplied by
    raises    ShapeError for pictures smaller than a window
    """
    if min(image.shape[:2]) < len(weights):
        raise ShapeError(
            f"SSIM of a picture of {image.shape[1]}x{image.shape[0]} px; its window is "
            f"{len(weights)} px, take larger pictures"
        )
    a, b = image.astype(np.float64), reference.astype(np.float64)
    maps = [window_means(values, weights) for values in (a, b, a * a, b * b, a * b)]
    mean_a, mean_b, square_a, square_b, product = maps
    variances = unbiased * (square_a - mean_a**2 + square_b - mean_b**2)
    covariance = unbiased * (product - mean_a * mean_b)
    above = (2 * mean_a * mean_b + SMALL[0]) * (2 * covariance + SMALL[1])
    below = (mean_a**2 + mean_b**2 + SMALL[0]) * (variances + SMALL[1])
    return float((above / below).mean())


def window_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means (H - n + 1, W - n + 1, 3) of the windows within values (H, W, 3)."""
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(values, len(weights), axis)
        values = windows @ weights
    return values


class Distortion:
    """What coding does to latents: sums for their variance and mean squared error."""

    def __init__(self) -> None:
        self.values, self.sums = 0, np.zeros(3)  # of values, their squares, squared errors

    def add(self, latents: np.ndarray, stored: np.ndarray) -> None:
        """Count latents, and those that the codes stand for, of one shape."""
        exact = latents.astype(np.float64)
        self.values += exact.size
        self.sums += exact.sum(), np.square(exact).sum(), np.square(exact - stored).sum()

    def to_json(self) -> dict[str, Any]:
        """Plain values; no SNR where nothing was lost."""
        if not self.values:
            return {"mse": 0.0, "snr_db": None}
        mean, square, mse = (self.sums / self.values).tolist()
        variance = square - mean * mean
        snr_db = 10 * float(np.log10(variance / mse)) if mse > 0 and variance > 0 else None
        return {"mse": float(f"{mse:.4g}"), "snr_db": None if snr_db is None else round(snr_db, 2)}
