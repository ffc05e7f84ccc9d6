"""PSNR and SSIM of uint8 pictures, by scikit-image; what coding loses of latents."""

from __future__ import annotations

from typing import Any

import numpy as np


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB of uint8 (H, W, 3) pictures, peak 255; infinite for equal ones."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(image, reference):
        return float("inf")
    return float(peak_signal_noise_ratio(reference, image, data_range=255))


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """SSIM of uint8 (H, W, 3) pictures as Wang et al. 2004.

    Gaussian window, sigma 1.5, mean over channels.
    """
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            reference, image, channel_axis=2, data_range=255,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
    )  # fmt: skip


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
