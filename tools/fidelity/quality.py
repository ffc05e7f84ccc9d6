"""SSIM with stated settings, and the similarity of embeddings."""
# B batch, D embedding dimensions, H W pixels

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from latentds.core.metrics import ssim, ssim_uniform

SSIM_SETTINGS = {
    "gaussian": "Gaussian window with sigma 1.5 (11x11), population covariance, mean "
    "over RGB channels, data range 255 (Wang et al. 2004)",
    "uniform": "scikit-image's defaults: 7x7 uniform window, sample covariance, mean over RGB "
    "channels, data range 255",
    "torchmetrics": "torchmetrics' defaults, Gaussian 11x11 window with sigma 1.5, mean over RGB "
    "channels, data range 1",
}
PSNR_SETTINGS = "8-bit RGB, data range 255, from the squared error of all three channels of a patch"
SIMILARITY_SETTINGS = (
    "cosine of the embeddings of the original and of the reconstruction rounded to 8 bits"
)


def measure_ssim(image: np.ndarray, reference: np.ndarray, settings: str) -> float:
    """SSIM of uint8 (H, W, 3) pictures by one of SSIM_SETTINGS."""
    if settings == "uniform":
        return ssim_uniform(image, reference)
    if settings == "torchmetrics":
        from torchmetrics.functional.image import structural_similarity_index_measure

        pair = to_images([image, reference])
        measured: Any = structural_similarity_index_measure(pair[:1], pair[1:], data_range=1.0)
        return float(measured)
    return ssim(image, reference)


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
