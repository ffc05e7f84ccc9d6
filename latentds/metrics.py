"""PSNR and SSIM of uint8 pictures, by scikit-image."""

from __future__ import annotations

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
