"""The pictures a codec is trained on, in memory, from a folder or a pack, and random crops of them.

Tiles are the open ones of the assets' folder (sources and licences: its SOURCES.md), or any folder
of one's own. UCSB and MoNuSeg are test sets and in no list here.

All pictures lie in one row of pixels, on the device; a crop is gathered from it by an index that
turns and flips as well. So a GPU draws its own crops, and a CPU the same ones by the same code.
"""
# B crops, N pixels of all pictures, s pixels of a crop's edge

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from latentds_trainers.train_codec.tile_packs import (
    HELD_OUT,
    MAX_PIXELS,
    in_squares,
    read_pack,
    webp,
    write_pack,
)
from torch import Tensor
from torch.nn import functional

from latentds.codecs.formats import DECODE_ERRORS
from latentds.core.storage import open_picture
from latentds.errors import InputError, missing_extra, no_folder
from latentds.sources.image_folder import picture_suffixes, walk
from latentds.sources.originals import pixels_of
from latentds.sources.slide_names import some

if TYPE_CHECKING:
    from latentds_trainers.train_codec.config import CodecSettings

JUDGED_PX = 256  # edge of what is judged, cut from a picture's middle
# Patients that no crop is drawn from: glioblastoma, and breast of three hospitals.
HELD_OUT_PATIENTS = ("TCGA-FG-A4MU", "TCGA-A7-A0DB", "TCGA-OL-A66N", "TCGA-A8-A08B")
# Pictures of dsb2018_he that the demo shows. They are its only ones in pink and purple H&E (the
# others are purple only, or cells on glass); all four show the same tissue with the same red
# vessels, so they are taken for one specimen, and no other picture of it is left to train on.
DEMO_HELD_OUT = ("4193474b2f1c72f7", "57bd029b19c1b382", "87ea72894f6534b2", "8f27ebc74164eddf")
JUDGED_TILES = 2  # of a held-out patient
OWN, OWN_HELD_OUT, OWN_JUDGED = "tiles", 20, 16  # one's own: every 20th is judged by, 16 at most
SWAP_SHARE = 0.3  # of the colour-mixed crops whose channels change places
MIXING = 0.12  # standard deviation of a mixing matrix's entries
GAMMAS, GAINS = (0.7, 1.4), (0.9, 1.1)


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
    return Tiles(
        pictures, shares_of(sources), middles([pixels_of(file, MAX_PIXELS) for file in held_out])
    )


def pack_tiles(path: Path, pack: Path) -> None:
    """Write what fits of a folder's tiles into one file, for a machine that has no such folder.

    raises  InputError as `read_tiles`
    """
    sources, held_out = list_tiles(path)
    pieces = {
        name: [piece for file in files for piece in pieces_of(file)]
        for name, files in sources.items()
    }
    judged = middles([pixels_of(file, MAX_PIXELS) for file in held_out]).mul(255).round().byte()
    kept = [webp(picture) for picture in judged.permute(0, 2, 3, 1).numpy()]
    write_pack(pack, pieces, shares_of(sources), {HELD_OUT: kept})


def read_pictures(path: Path) -> list[np.ndarray]:
    """The picture of a file; of a slide, all of its finest level."""
    if path.suffix != ".svs":
        return [pixels_of(path, MAX_PIXELS)]
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


def pieces_of(path: Path) -> list[bytes]:
    """What a pack holds of a file: a JPEG as it is, another picture in squares without loss."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        return [path.read_bytes()]
    return [piece for picture in read_pictures(path) for piece in in_squares(picture)]


@dataclasses.dataclass(frozen=True)
class TileSource:
    """Where tiles lie below the assets' folder, their share of the crops, whom they are owed to.

    attribution  as their licence asks for; empty where it asks for nothing
    """

    folders: tuple[str, ...]
    share: float
    attribution: str = ""


# Many kinds of stain and camera matter more than many pictures: none rules, and JPEG sources,
# whose block noise is learned too, stay below a fifth.
SOURCES = {
    "tcga_gbm": TileSource(("tiles/tcga_gbm",), 0.22, "images from The Cancer Genome Atlas"),
    "brca_m2c": TileSource(
        ("tiles_open/brca_m2c_tcga",),
        0.22,
        "BRCA-M2C, Copyright (c) 2022 TopoXLab, BSD-3-Clause; Abousamra et al., ICCV 2021; images "
        "from The Cancer Genome Atlas",
    ),
    "dsb2018_he": TileSource(
        ("segmentation/dsb2018_he/images",), 0.12, "Data Science Bowl 2018 / BBBC038 (CC0)"
    ),
    "md_midogpp": TileSource(
        ("tiles_open/atnorm_md_midogpp",),
        0.12,
        "AtNorM-MD, Banerjee et al. 2025 (MIT, Copyright (c) 2025 DeepMicroscopy); MIDOG++, "
        "Aubreville et al. 2023",
    ),
    "slide": TileSource(("wsi/CMU-1-Small-Region.svs",), 0.10, "OpenSlide test data, CMU-1 (CC0)"),
    "oral": TileSource(
        ("classification/oral_cc0_jpeg", "tiles_open/oral_cc0_originals_jpeg"),
        0.06,
        "Oral Cancer Images, ashenafifasilkebede (CC0)",
    ),
    "osteosarcoma": TileSource(
        ("tiles_open/osteosarcoma_tcia_jpeg",),
        0.05,
        "Leavey et al. 2019, Osteosarcoma data from UT Southwestern/UT Dallas, The Cancer Imaging "
        "Archive, doi 10.7937/tcia.2019.bvhjhdas, CC BY 3.0",
    ),
    "atnorm_br": TileSource(
        ("tiles_open/atnorm_br_tcga",),
        0.05,
        "AtNorM-Br, Banerjee et al. 2025 (MIT, Copyright (c) 2025 DeepMicroscopy); images from The "
        "Cancer Genome Atlas",
    ),
    "brecahad": TileSource(
        ("tiles_open/brecahad_jpeg",),
        0.04,
        "Aksac, Demetrick, Ozyer, Alhajj 2019, BreCaHAD, doi 10.6084/m9.figshare.7379186.v3, CC BY "
        "4.0",
    ),
    "singles": TileSource(
        ("tiles_open/singles",),
        0.02,
        "images from The Cancer Genome Atlas; OpenSlide test data, OS-1.ndpi",
    ),
}


def list_tiles(root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Files to train on by source, and files to judge by."""
    is_open = all((root / folder).exists() for s in SOURCES.values() for folder in s.folders)
    sources, held_out = list_open(root) if is_open else list_own(root)
    if not held_out or not all(sources.values()):
        count = len(held_out) + sum(map(len, sources.values()))
        raise InputError(f"{root}: {count} pictures; training takes {OWN_HELD_OUT} or more")
    return sources, held_out


def list_open(root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The open tiles in the assets' folder, without held-out patients and the demo's specimen."""
    files = {
        name: [file for folder in source.folders for file in picture_files(root / folder)]
        for name, source in SOURCES.items()
    }
    left_out = HELD_OUT_PATIENTS + DEMO_HELD_OUT
    sources = {
        name: [file for file in found if not file.name.startswith(left_out)]
        for name, found in files.items()
    }
    held_out = [
        file
        for patient in HELD_OUT_PATIENTS
        for file in [f for found in files.values() for f in found if f.name.startswith(patient)][
            :JUDGED_TILES
        ]
    ]
    return sources, held_out


def list_own(root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Any other folder's pictures as one source; every twentieth is judged by.

    raises  InputError for pictures that are smaller than what is judged: crops would mirror them
    """
    files = picture_files(root)
    if small := [str(file.relative_to(root)) for file in files if is_small(file)]:
        raise InputError(
            f"{root}: {len(small)} of {len(files)} pictures have less than {JUDGED_PX} px each "
            f"way: {some(small)}; take them out"
        )
    held_out = files[OWN_HELD_OUT - 1 :: OWN_HELD_OUT][:OWN_JUDGED]
    apart = set(held_out)
    return {OWN: [file for file in files if file not in apart]}, held_out


def is_small(path: Path) -> bool:
    """Whether a picture's header says so; one that cannot be read is told of when it is."""
    try:
        with open_picture(path) as picture:
            return min(picture.size) < JUDGED_PX
    except (InputError, *DECODE_ERRORS):
        return False


def picture_files(path: Path) -> list[Path]:
    """Pictures below a folder, sorted, hidden ones left out, links followed; a file is itself."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise no_folder(path, "file or folder")
    suffixes, found = picture_suffixes(), (path / name for name in walk(path))
    return sorted(file for file in found if file.suffix.lower() in suffixes)


def attribution_of(names: Iterable[str]) -> tuple[str, ...]:
    """What the licences of these sources ask to be said, a line each, none twice."""
    lines = [SOURCES[name].attribution for name in names if name in SOURCES]
    return tuple(dict.fromkeys(line for line in lines if line))


def shares_of(sources: dict[str, list[Path]]) -> dict[str, float]:
    return {name: SOURCES[name].share if name in SOURCES else 1.0 for name in sources}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """What one crop is: a square of a picture, turned, flipped, its colours changed.

    start          of the picture in the row of pixels
    size           of the picture: height, width
    corner         of the square: top, left; a smaller picture goes on, reflected at its edges
    scale          2 where the square is twice as large and averaged down
    mixing, gamma  of the colours; the identity and 1 where they stay
    gain           of the channels (3,)
    """

    start: int
    size: tuple[int, int]
    corner: tuple[int, int]
    scale: int
    turns: int
    is_flipped: bool
    mixing: np.ndarray
    gamma: float
    gain: np.ndarray


class Crops:
    """Pictures of several sources to draw crops from.

    pictures  by source, uint8 (H, W, 3)
    shares    of the crops by source, summing to 1
    config    of the crops for training
    device    that holds the pixels and makes the crops
    """

    def __init__(
        self,
        pictures: Mapping[str, Sequence[np.ndarray]],
        shares: Mapping[str, float],
        config: CodecSettings,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.shares = config, list(shares.values())
        self.sizes = [[picture.shape[:2] for picture in pictures[source]] for source in shares]
        ends = np.cumsum([h * w for source in self.sizes for h, w in source])
        counts = np.cumsum([len(source) for source in self.sizes])[:-1]
        self.starts = np.split(np.concatenate([[0], ends[:-1]]), counts)
        row = np.concatenate([p.reshape(-1, 3) for source in shares for p in pictures[source]])
        self.pixels_N3 = torch.from_numpy(row).to(device)

    def batch(
        self, step: int, places: Iterable[int], config: CodecSettings | None = None
    ) -> Tensor:
        """Crops (B, 3, s, s) in [0, 1] at these places of the step's global batch.

        config  where crops are to be drawn otherwise than for training
        """
        config = config or self.config
        draws = [self.draw(config, step, place) for place in places]
        images = [self.square(draw, config.crop_px) for draw in draws]
        return recoloured(torch.stack(images), draws)

    def draw(self, config: CodecSettings, step: int, place: int) -> Draw:
        """What the crop at a place of a step is."""
        rng = np.random.default_rng([config.seed, step, place])
        source = int(rng.choice(len(self.shares), p=self.shares))
        index = int(rng.integers(len(self.sizes[source])))
        size = self.sizes[source][index]
        fits_half = min(size) >= 2 * config.crop_px
        scale = 2 if fits_half and rng.random() < config.half_scale_share else 1
        rooms = [max(length - scale * config.crop_px, 0) for length in size]
        top, left = (int(rng.integers(room + 1)) for room in rooms)
        turns, is_flipped = int(rng.integers(4)), bool(rng.random() < 0.5)
        mixing, gamma = np.eye(3), 1.0
        if rng.random() < config.stain_share:
            mixing, gamma = draw_colours(rng)
        return Draw(
            start=int(self.starts[source][index]),
            size=size,
            corner=(top, left),
            scale=scale,
            turns=turns,
            is_flipped=is_flipped,
            mixing=mixing,
            gamma=gamma,
            gain=rng.uniform(*GAINS, 3),
        )

    def square(self, draw: Draw, crop_px: int) -> Tensor:
        """The pixels (3, s, s) of a draw in [0, 1], turned and flipped, colours as they are."""
        line = torch.arange(draw.scale * crop_px, device=self.pixels_N3.device)
        rows, columns = (
            reflected(line + first, length)
            for first, length in zip(draw.corner, draw.size, strict=True)
        )
        index = draw.start + rows[:, None] * draw.size[1] + columns
        index = torch.rot90(index, draw.turns)
        index = index.flip(1) if draw.is_flipped else index
        image = self.pixels_N3[index].permute(2, 0, 1).float() / 255
        return functional.avg_pool2d(image, 2) if draw.scale == 2 else image


def reflected(places: Tensor, length: int) -> Tensor:
    """Places from 0 on, those beyond a length turned back at its last one and its first."""
    last = length - 1
    return last - (last - places % max(2 * last, 1)).abs()


def draw_colours(rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A matrix that mixes the channels a little, at times swapped, and a gamma."""
    channels = rng.permutation(3) if rng.random() < SWAP_SHARE else np.arange(3)
    return np.eye(3)[channels] + rng.normal(0, MIXING, (3, 3)), float(rng.uniform(*GAMMAS))


def recoloured(images: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Images (B, 3, s, s) in the colours of their draws."""
    mixing, gain = (
        torch.from_numpy(np.stack(values)).float().to(images.device)
        for values in ([draw.mixing for draw in draws], [draw.gain for draw in draws])
    )
    gamma = torch.tensor([draw.gamma for draw in draws]).to(images)
    images = torch.einsum("bij,bjhw->bihw", mixing, images).clamp(0, 1)
    return (images ** gamma.view(-1, 1, 1, 1) * gain[:, :, None, None]).clamp_(0, 1)
