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
# Patients that no crop is drawn from: glioblastoma (8 tiles), and breast of three hospitals.
HELD_OUT = ("TCGA-FG-A4MU", "TCGA-A7-A0DB", "TCGA-OL-A66N", "TCGA-A8-A08B")
# Pictures of dsb2018_he that the demo shows. They are its only ones in pink and purple H&E (the
# others are purple only, or cells on glass); all four show the same tissue with the same red
# vessels, so they are taken for one specimen, and no other picture of it is left to train on.
DEMO_HELD_OUT = ("4193474b2f1c72f7", "57bd029b19c1b382", "87ea72894f6534b2", "8f27ebc74164eddf")
LEFT_OUT = HELD_OUT + DEMO_HELD_OUT
JUDGED_TILES = 2  # of a held-out patient

# Folders of a source and its share of the crops. Many kinds of stain and camera matter more than
# many pictures; none rules, and JPEG sources, whose block noise is learned too, stay below a third.
SOURCES: dict[str, tuple[tuple[str, ...], float]] = {
    "tcga_gbm": (("tiles/tcga_gbm",), 0.22),
    "brca_m2c": (("tiles_open/brca_m2c_tcga",), 0.22),
    "dsb2018_he": (("segmentation/dsb2018_he/images",), 0.12),
    "md_midogpp": (("tiles_open/atnorm_md_midogpp",), 0.12),
    "slide": (("wsi/CMU-1-Small-Region.svs",), 0.10),
    "oral": (("classification/oral_cc0_jpeg", "tiles_open/oral_cc0_originals_jpeg"), 0.06),
    "osteosarcoma": (("tiles_open/osteosarcoma_tcia_jpeg",), 0.05),
    "atnorm_br": (("tiles_open/atnorm_br_tcga",), 0.05),
    "brecahad": (("tiles_open/brecahad_jpeg",), 0.04),
    "singles": (("tiles_open/singles",), 0.02),
}
SHARES = {name: share for name, (_, share) in SOURCES.items()}

Tiles = dict[str, list[np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How crops are drawn."""

    crop_px: int
    half_scale_share: float
    stain_share: float
    seed: int


def read_tiles(root: Path) -> Tiles:
    """The training pictures by source, as uint8 (H, W, 3) arrays in memory (about 450 MB)."""
    return {
        name: [picture for folder in folders for picture in read_pictures(root / folder)]
        for name, (folders, _) in SOURCES.items()
    }


def read_pictures(path: Path) -> list[np.ndarray]:
    """The pictures of a folder that may be trained on, or the one picture that a slide is."""
    if path.suffix == ".svs":
        import openslide

        slide = openslide.OpenSlide(path)
        return [np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))]
    paths = [p for p in sorted(path.rglob("*.[pj][np]g")) if not p.name.startswith(LEFT_OUT)]
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def read_held_out(root: Path) -> Tensor:
    """Centre crops (n, 3, 256, 256) in [0, 1] of the held-out patients' first tiles."""
    folders = (root / "tiles" / "tcga_gbm", root / "tiles_open" / "brca_m2c_tcga")
    paths = [
        path
        for patient in HELD_OUT
        for path in sorted(p for folder in folders for p in folder.glob(f"{patient}*.png"))[
            :JUDGED_TILES
        ]
    ]
    crops = []
    for path in paths:
        picture = np.asarray(Image.open(path).convert("RGB"))
        top, left = (side // 2 - 128 for side in picture.shape[:2])
        crops.append(picture[top : top + 256, left : left + 256])
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
    picture = at_least(pictures[rng.integers(len(pictures))], config.crop_px)
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


def at_least(picture: np.ndarray, edge: int) -> np.ndarray:
    """The picture, reflected at its bottom and right where it is smaller than a crop."""
    height, width = picture.shape[:2]
    if min(height, width) >= edge:
        return picture
    missing = ((0, max(0, edge - height)), (0, max(0, edge - width)), (0, 0))
    return np.pad(picture, missing, mode="reflect")


def mix_colours(image: Tensor, rng: np.random.Generator) -> Tensor:
    """The image (3, H, W) with channels swapped at times, mixed a little, and another gamma."""
    channels = rng.permutation(3) if rng.random() < SWAP_SHARE else np.arange(3)
    mixing = np.eye(3)[channels] + rng.normal(0, 0.12, (3, 3))
    mixed = torch.einsum("ij,jhw->ihw", torch.from_numpy(mixing).float(), image)
    return mixed.clamp(0, 1) ** float(rng.uniform(0.7, 1.4))
