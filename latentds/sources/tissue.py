"""Which parts of a slide are tissue: named rules on a thumbnail, or on the patch itself."""
# H W pixels of a thumbnail

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

RULES = ("otsu", "clam", "dsmil", "none")
# Saturation of 255 below which nothing is stained; CLAM's default (create_patches_fp.py, sthresh).
CLAM_SATURATION = 8
# Below it Otsu's split of an empty slide would call noise tissue.
LEAST_SATURATION = 12
MEDIAN_PX = 7  # CLAM's mthresh
DARK = 40  # value of 255: pen and coverslip edges, whose saturation is noise
DSMIL_EDGES = 15  # deepzoom_tiler.py, background_t


def tissue_mask(thumbnail: np.ndarray, rule: str) -> np.ndarray:
    """Whether each pixel of a thumbnail, uint8 (H, W, 3), is tissue: bool (H, W).

    otsu   HSV saturation, median of 7 px, above Otsu's threshold (12 of 255 at least), not dark
    clam   the same above 8 of 255, CLAM's default threshold
    none, dsmil   everywhere; dsmil looks at the patches themselves
    """
    if rule in ("none", "dsmil"):
        return np.ones(thumbnail.shape[:2], bool)
    hsv = np.asarray(Image.fromarray(thumbnail).convert("HSV"))
    smooth = Image.fromarray(hsv[:, :, 1]).filter(ImageFilter.MedianFilter(MEDIAN_PX))
    saturation = np.asarray(smooth)
    threshold = CLAM_SATURATION
    if rule == "otsu":
        threshold = max(otsu(saturation), LEAST_SATURATION)
    mask: np.ndarray = (saturation > threshold) & (hsv[:, :, 2] > DARK)
    return mask


def otsu(values: np.ndarray) -> int:
    """Otsu's threshold of uint8 values: above it is the upper class (Otsu 1979)."""
    counts = np.bincount(values.reshape(-1), minlength=256).astype(np.float64)
    below, levels = np.cumsum(counts), np.arange(256)
    above = below[-1] - below
    sums = np.cumsum(counts * levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return int(np.nanargmax(between)) if np.isfinite(between).any() else 0


def tissue_shares(mask: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Share of tissue in boxes of a mask (H, W): boxes float (n, 4), left, top, right, bottom.

    A box smaller than a pixel takes that pixel.
    """
    height, width = mask.shape
    integral = np.zeros((height + 1, width + 1), np.int64)
    integral[1:, 1:] = mask.cumsum(0).cumsum(1)
    left = np.clip(np.floor(boxes[:, 0]), 0, width - 1).astype(int)
    top = np.clip(np.floor(boxes[:, 1]), 0, height - 1).astype(int)
    right = np.clip(np.ceil(boxes[:, 2]), left + 1, width).astype(int)
    bottom = np.clip(np.ceil(boxes[:, 3]), top + 1, height).astype(int)
    sums = (
        integral[bottom, right]
        - integral[top, right]
        - integral[bottom, left]
        + integral[top, left]
    )
    shares: np.ndarray = sums / ((right - left) * (bottom - top))
    return shares


def has_edges(patch: np.ndarray) -> bool:
    """DSMIL's rule: the mean over channels and pixels of Pillow's FIND_EDGES is above 15."""
    edges = np.asarray(Image.fromarray(patch).filter(ImageFilter.FIND_EDGES))
    return float(edges.mean()) > DSMIL_EDGES
