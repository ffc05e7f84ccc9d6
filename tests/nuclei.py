"""Folders of small drawn images with masks, for segmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def draw_nuclei(seed: int, height: int = 64, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Dark discs on pink, uint8 (H, W, 3), and their mask of 0 and 255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    for _ in range(5):
        centre, radius = rng.uniform(8, (height - 8, width - 8)), rng.uniform(5, 11)
        mask[np.hypot(y - centre[0], x - centre[1]) < radius] = 255
    colours = np.where(mask[..., None] > 0, (90, 60, 150), (230, 180, 210))
    noisy = colours + rng.normal(0, 6, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8), mask


def save_nuclei(
    root: Path,
    count: int = 8,
    *,
    size_px: tuple[int, int] = (64, 64),
    values: tuple[int, int] = (0, 255),
    first: int = 0,
) -> Path:
    """root/images/n00.png and root/masks/n00.png; `values` stand for background and nuclei."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        image, mask = draw_nuclei(number, *size_px)
        Image.fromarray(image).save(root / "images" / f"n{number:02d}.png")
        stored = np.where(mask > 0, values[1], values[0]).astype(np.uint8)
        Image.fromarray(stored).save(root / "masks" / f"n{number:02d}.png")
    return root


def one_fold(root: Path, count: int = 8) -> dict[str, Path]:
    """Settings of a run of one fold that tests the first half of root's images."""
    table = root / "one_fold.csv"
    rows = "".join(f"n{i:02d},{-1 if i < count // 2 else 1}\n" for i in range(count))
    table.write_text("img_id,fold\n" + rows)
    return {"fold_table": table}
