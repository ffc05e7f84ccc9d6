"""What a segmentation run sees: crops of decoded images with their labels, or images whole."""
# B images of a forward pass, H W pixels of a patch, h w of what the network sees, K labels with 0

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from latentds_trainers.sampath.segmentation_presets import SegmentationSettings
from torch import Tensor

from latentds.core.randomness import key_of, patch_seeds, shuffled, uniform
from latentds.errors import InputError, missing_extra
from latentds.views.mask_geometry import random_views, whole

if TYPE_CHECKING:
    from latentds.evaluation.patchsets.patches import PatchSet

JITTERED = 0.5  # share of the crops whose colours change: albumentations' default
COUNTED_AT_ONCE = 16
COLOURS = ("brightness", "contrast", "saturation", "hue")


class LabelledImages:
    """Decoded images and the labels of their masks, by row of the patch set."""

    def __init__(self, settings: SegmentationSettings, patches: PatchSet) -> None:
        self.settings, self.patches, self.values = settings, patches, settings.values
        self.sources = patches.table.sources

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W); InputError for values that stand for nothing."""
        sources = [self.sources[row] for row in rows.tolist()]
        return self.values.labels(self.patches.masks(rows), sources)

    def count_pixels(self) -> tuple[np.ndarray, str]:
        """int64 (N, K): pixels of every image by label; and a hash of all labels, 16 hex digits.

        Reads and checks every mask.
        """
        size, counts, hashed = len(self.values.names), [], hashlib.sha256()
        for start in range(0, len(self.patches), COUNTED_AT_ONCE):
            rows = np.arange(start, min(start + COUNTED_AT_ONCE, len(self.patches)))
            for labels in self.labels(rows):
                counts.append(np.bincount(labels.ravel(), minlength=size))
                hashed.update(labels.tobytes())
        return np.stack(counts), hashed.hexdigest()[:16]

    def crops(self, images: Tensor, rows: np.ndarray, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Random views of images uint8 (B, 3, H, W): float (B, 3, h, w), labels uint8 (B, h, w)."""
        settings, edge = self.settings, self.settings.image_size
        views = random_views(
            seeds,
            (int(images.shape[-2]), int(images.shape[-1])),
            (edge, edge),
            scale=settings.crop_scale,
            flip=settings.flip,
            turn=settings.turn,
        )
        labels = torch.from_numpy(self.labels(rows)).to(images.device)
        seen = torch.stack([view.image(image) for view, image in zip(views, images, strict=True)])
        masks = torch.stack([view.mask(mask) for view, mask in zip(views, labels, strict=True)])
        return jitter(seen, seeds, settings.jitter), masks

    def whole(self, rows: np.ndarray) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Row, image float (1, 3, h, w) and labels uint8 (h, w), one after the other.

        Resized where the config says so, else of the patch's own size.
        """
        edge = self.settings.image_size
        stream = self.patches.stream(np.array([row]) for row in rows)
        for row, image in zip(rows.tolist(), stream, strict=True):
            labels = torch.from_numpy(self.labels(np.array([row]))[0]).to(image.device)
            size = (int(image.shape[-2]), int(image.shape[-1]))
            view = whole(size, (edge, edge) if self.settings.odd_size == "resize" else size)
            yield row, view.image(image[0])[None], view.mask(labels)


class CropDraws:
    """Which image is at a place of the training's long row of images, and by which seed it is cut.

    Every epoch is a permutation of `rows`; a place's draw follows from (seed, place) alone.
    """

    def __init__(self, rows: np.ndarray, seed: int) -> None:
        if not len(rows):
            raise InputError("no images to train on")
        self.rows, self.seed = rows, seed
        self.orders: dict[int, np.ndarray] = {}

    def at(self, places: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Rows int64 (B,) and seeds int64 (B,) of places counted from the first step on."""
        epochs, within = np.divmod(places, len(self.rows))
        chosen = [self.order(e)[i] for e, i in zip(epochs.tolist(), within.tolist(), strict=True)]
        rows = self.rows[chosen]
        seeds = patch_seeds(self.seed, epochs, np.zeros_like(epochs), rows)
        return rows, torch.from_numpy(seeds)

    def order(self, epoch: int) -> np.ndarray:
        """Places in `rows` of the images of an epoch."""
        if epoch not in self.orders:
            for old in [number for number in self.orders if number < epoch - 1]:
                del self.orders[old]
            self.orders[epoch] = shuffled(len(self.rows), key_of("images", self.seed, epoch))
        return self.orders[epoch]


def jitter(images: Tensor, seeds: Tensor, strength: float) -> Tensor:
    """Half of the images (B, 3, h, w) in [0, 1] with other brightness, contrast, saturation, hue.

    strength  factors are drawn from 1 - strength to 1 + strength, hue's shift from -strength to
              strength of a turn; in a random order
    """
    if not strength:
        return images
    draws = uniform(seeds, "jitter", len(COLOURS) + 2).tolist()
    return torch.stack(
        [
            recoloured(image, numbers, strength) if numbers[-1] < JITTERED else image
            for image, numbers in zip(images, draws, strict=True)
        ]
    )


def recoloured(image: Tensor, draws: list[float], strength: float) -> Tensor:
    """One image (3, h, w) with its colours changed by numbers in [0, 1)."""
    try:
        from torchvision.transforms import functional
    except ImportError as error:
        raise missing_extra("torchvision", "evaluate") from error
    for place in shuffled(len(COLOURS), int(draws[len(COLOURS)] * (1 << 24))).tolist():
        name, shift = COLOURS[place], (2 * draws[place] - 1) * strength
        change = getattr(functional, f"adjust_{name}")
        image = change(image, shift if name == "hue" else 1 + shift)
    return image
