"""Random crops of openly licensed tiles, each a function of seed, step and place in the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

SWAP_SHARE = 0.3  # of the colour-mixed crops whose channels change places
HELD_OUT = "TCGA-FG-A4MU"  # one patient of tiles/tcga_gbm, for the validation figure
# Share of the crops of a batch. Lossless tiles lead: JPEG sources teach the network their block
# noise.
SHARES = {"tcga_gbm": 0.40, "dsb2018_he": 0.25, "slide": 0.20, "oral_cc0_jpeg": 0.15}

Tiles = dict[str, list[np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How crops are drawn."""

    crop_px: int
    half_scale_share: float
    stain_share: float
    seed: int


def read_tiles(root: Path) -> Tiles:
    """The training pictures by source, as uint8 (H, W, 3) arrays in memory (about 130 MB)."""
    import openslide

    folders = {
        "tcga_gbm": "tiles/tcga_gbm",
        "dsb2018_he": "segmentation/dsb2018_he/images",
        "oral_cc0_jpeg": "classification/oral_cc0_jpeg",
    }
    tiles = {
        name: [
            np.asarray(Image.open(path).convert("RGB"))
            for path in sorted((root / folder).rglob("*.[pj][np]g"))
            if not path.name.startswith(HELD_OUT)
        ]
        for name, folder in folders.items()
    }
    slide = openslide.OpenSlide(root / "wsi" / "CMU-1-Small-Region.svs")
    tiles["slide"] = [np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))]
    return tiles


def read_held_out(root: Path) -> Tensor:
    """Centre crops (n, 3, 256, 256) in [0, 1] of the held-out patient."""
    paths = sorted((root / "tiles" / "tcga_gbm").glob(f"{HELD_OUT}*.png"))
    crops = [np.asarray(Image.open(path).convert("RGB"))[128:384, 128:384] for path in paths]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def random_crops(tiles: Tiles, config: CropConfig, step: int, places: Iterable[int]) -> Tensor:
    """Crops (B, 3, crop, crop) in [0, 1] at these places of the step's global batch."""
    return torch.stack([one_crop(tiles, config, step, place) for place in places])


def one_crop(tiles: Tiles, config: CropConfig, step: int, place: int) -> Tensor:
    """A crop (3, crop, crop), which depends on the seed, the step and the place alone.

    Flips, right-angle turns, gain jitter, at times half scale or mixed colours.
    """
    rng = np.random.default_rng([config.seed, step, place])
    source = rng.choice(len(SHARES), p=list(SHARES.values()))
    pictures = tiles[list(SHARES)[source]]
    picture = pictures[rng.integers(len(pictures))]
    fits_half = min(picture.shape[:2]) >= 2 * config.crop_px
    scale = 2 if fits_half and rng.random() < config.half_scale_share else 1
    side = scale * config.crop_px
    top = rng.integers(picture.shape[0] - side + 1)
    left = rng.integers(picture.shape[1] - side + 1)
    crop = np.rot90(picture[top : top + side, left : left + side], int(rng.integers(4)))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    image = torch.from_numpy(crop.copy()).permute(2, 0, 1).float() / 255
    if scale == 2:
        image = functional.avg_pool2d(image, 2)
    if rng.random() < config.stain_share:
        image = mix_colours(image, rng)
    gain = torch.from_numpy(rng.uniform(0.9, 1.1, (3, 1, 1))).float()
    return (image * gain).clamp_(0, 1)


def mix_colours(image: Tensor, rng: np.random.Generator) -> Tensor:
    """The image (3, H, W) with channels swapped at times, mixed a little, and another gamma."""
    channels = rng.permutation(3) if rng.random() < SWAP_SHARE else np.arange(3)
    mixing = np.eye(3)[channels] + rng.normal(0, 0.12, (3, 3))
    mixed = torch.einsum("ij,jhw->ihw", torch.from_numpy(mixing).float(), image)
    return mixed.clamp(0, 1) ** float(rng.uniform(0.7, 1.4))
