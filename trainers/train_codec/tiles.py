"""The pictures a codec is trained on, in memory, from a folder or from one packed file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from latentds_trainers.train_codec.tile_pack import pieces_of, read_pack, webp, write_pack
from latentds_trainers.train_codec.tile_sources import list_tiles, shares_of
from torch import Tensor

from latentds.core.untrusted_files import pixels_of
from latentds.errors import InputError, missing_extra

JUDGED_PX = 256  # edge of what is judged, cut from a picture's middle
HELD_OUT = "held_out"  # what a pack calls the pictures that are judged by


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Pictures to draw crops from, and others to judge by.

    pictures  by source, uint8 (H, W, 3)
    shares    of the crops by source, summing to 1
    held_out  float (n, 3, 256, 256) in [0, 1]
    """

    pictures: dict[str, list[np.ndarray]]
    shares: dict[str, float]
    held_out: Tensor


def read_tiles(path: Path) -> Tiles:
    """The tiles of a folder or of a pack, all in memory (about 450 MB for the open ones).

    path    the assets' folder, any folder of pictures, or a file that `pack_tiles` wrote
    raises  InputError where there is too little to train on or to judge by, or the file is no pack
    """
    if path.is_file():
        packed, shares = read_pack(path)
        return Tiles(packed, shares, middles(packed.pop(HELD_OUT)))
    sources, held_out = list_tiles(path)
    pictures = {
        name: [picture for file in files for picture in read_pictures(file)]
        for name, files in sources.items()
    }
    return Tiles(pictures, shares_of(sources), middles([pixels_of(file) for file in held_out]))


def pack_tiles(path: Path, pack: Path) -> None:
    """Write what fits of a folder's tiles into one file, for a machine that has no such folder.

    raises  InputError as `read_tiles`
    """
    sources, held_out = list_tiles(path)
    pieces = {
        name: [piece for file in files for piece in pieces_of(file, read_pictures)]
        for name, files in sources.items()
    }
    judged = middles([pixels_of(file) for file in held_out]).mul(255).round().byte()
    kept = [webp(picture) for picture in judged.permute(0, 2, 3, 1).numpy()]
    write_pack(pack, pieces, shares_of(sources), {HELD_OUT: kept})


def read_pictures(path: Path) -> list[np.ndarray]:
    """The picture of a file; of a slide, all of its finest level."""
    if path.suffix != ".svs":
        return [pixels_of(path)]
    try:
        import openslide
    except ModuleNotFoundError as error:
        raise missing_extra("openslide-python", "slides") from error
    with openslide.OpenSlide(path) as slide:
        return [np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))]


def middles(pictures: list[np.ndarray]) -> Tensor:
    """The middle of every picture, float (n, 3, 256, 256) in [0, 1]."""
    squares = []
    for picture in pictures:
        top, left = ((side - JUDGED_PX) // 2 for side in picture.shape[:2])
        if min(top, left) < 0:
            raise InputError(
                f"a held-out picture of {picture.shape[1]}x{picture.shape[0]} px; at least "
                f"{JUDGED_PX} each way"
            )
        squares.append(picture[top : top + JUDGED_PX, left : left + JUDGED_PX])
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255
