"""The pictures a codec is trained on, in memory, from a folder or from one packed file.

    pack.json                   latentds-tiles/1, shares of the crops by source
    SOURCE/0001.jpg, .webp      JPEG files as they are; the pixels of others in squares, lossless
    held_out/0000.webp          what is judged by

A pack is a plain zip of pictures, of bounded size, for a machine that has no more. A source gets
bytes in proportion to its share of the crops; what it does not need, others get.

Tiles are the open ones of the assets' folder (sources and licences: its SOURCES.md), or any folder
of one's own. UCSB and MoNuSeg are test sets and in no list here.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentds.core.storage import open_picture, write_atomically
from latentds.errors import InputError, missing_extra
from latentds.sources.image_folder import picture_suffixes
from latentds.sources.picture_files import read_picture

JUDGED_PX = 256  # edge of what is judged, cut from a picture's middle
HELD_OUT = "held_out"  # what a pack calls the pictures that are judged by
FORMAT = "latentds-tiles/1"
RECORD = "pack.json"
MAX_BYTES = 54_000_000
SQUARE_PX = 256
LEAST_PX = 96  # of a square at a picture's right and bottom edge
MAX_PICTURES, MAX_PIXELS = 100_000, 64_000_000
# Patients that no crop is drawn from: glioblastoma, and breast of three hospitals.
HELD_OUT_PATIENTS = ("TCGA-FG-A4MU", "TCGA-A7-A0DB", "TCGA-OL-A66N", "TCGA-A8-A08B")
# Pictures of dsb2018_he that the demo shows. They are its only ones in pink and purple H&E (the
# others are purple only, or cells on glass); all four show the same tissue with the same red
# vessels, so they are taken for one specimen, and no other picture of it is left to train on.
DEMO_HELD_OUT = ("4193474b2f1c72f7", "57bd029b19c1b382", "87ea72894f6534b2", "8f27ebc74164eddf")
JUDGED_TILES = 2  # of a held-out patient
OWN, OWN_HELD_OUT, OWN_JUDGED = "tiles", 20, 16  # one's own: every 20th is judged by, 16 at most


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
    return Tiles(pictures, shares_of(sources), middles([pixels_in(file) for file in held_out]))


def pack_tiles(path: Path, pack: Path) -> None:
    """Write what fits of a folder's tiles into one file, for a machine that has no such folder.

    raises  InputError as `read_tiles`
    """
    sources, held_out = list_tiles(path)
    pieces = {
        name: [piece for file in files for piece in pieces_of(file)]
        for name, files in sources.items()
    }
    judged = middles([pixels_in(file) for file in held_out]).mul(255).round().byte()
    kept = [webp(picture) for picture in judged.permute(0, 2, 3, 1).numpy()]
    write_pack(pack, pieces, shares_of(sources), {HELD_OUT: kept})


def read_pictures(path: Path) -> list[np.ndarray]:
    """The picture of a file; of a slide, all of its finest level."""
    if path.suffix != ".svs":
        return [pixels_in(path)]
    try:
        import openslide
    except ModuleNotFoundError as error:
        raise missing_extra("openslide-python", "slides") from error
    with openslide.OpenSlide(path) as slide:
        return [np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))]


def pixels_in(path: Path) -> np.ndarray:
    """Pixels uint8 (H, W, 3) of a picture; InputError that names one of no use."""
    try:
        return read_picture(path, MAX_PIXELS)[0]
    except InputError as error:
        raise InputError(f"{path}: {error}; repair it or take it out of the folder") from error


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
    return [webp(square) for picture in read_pictures(path) for square in squares(picture)]


def squares(picture: np.ndarray) -> list[np.ndarray]:
    """A picture (H, W, 3) in squares of 256 px; smaller ones at its edges, where worth keeping."""
    height, width = picture.shape[:2]
    found = [
        picture[top : top + SQUARE_PX, left : left + SQUARE_PX]
        for top in range(0, height, SQUARE_PX)
        for left in range(0, width, SQUARE_PX)
    ]
    return [square for square in found if min(square.shape[:2]) >= LEAST_PX]


def webp(picture: np.ndarray) -> bytes:
    """A picture uint8 (H, W, 3) as lossless WebP."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "webp", lossless=True, quality=60)
    return file.getvalue()


def write_pack(
    path: Path,
    pieces: Mapping[str, list[bytes]],
    shares: Mapping[str, float],
    whole: Mapping[str, list[bytes]],
    max_bytes: int = MAX_BYTES,
) -> None:
    """Write a pack of at most so many bytes.

    pieces  pictures by source, of which a part is kept: evenly spread ones
    whole   pictures that are all kept
    """
    sizes = {name: sum(map(len, found)) for name, found in pieces.items()}
    room = max_bytes - sum(len(piece) for found in whole.values() for piece in found)
    allowed = budgets(sizes, shares, room)
    kept = dict(whole) | {name: spread(pieces[name], allowed[name]) for name in pieces}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(RECORD, json.dumps({"format": FORMAT, "shares": dict(shares)}))
        for source, found in kept.items():
            for number, piece in enumerate(found):
                suffix = "jpg" if piece.startswith(b"\xff\xd8") else "webp"
                archive.writestr(f"{source}/{number:05d}.{suffix}", piece)
    write_atomically(path, file.getvalue())


def budgets(sizes: Mapping[str, int], shares: Mapping[str, float], room: int) -> dict[str, int]:
    """Bytes of each source: all it has where its share of the room allows it, else its share."""
    given: dict[str, int] = {}
    while len(given) < len(sizes):
        open_shares = sum(shares[name] for name in sizes if name not in given)
        left = room - sum(given.values())
        fair = {n: int(left * shares[n] / open_shares) for n in sizes if n not in given}
        satisfied = {name: sizes[name] for name in fair if sizes[name] <= fair[name]}
        given |= satisfied or fair
    return given


def spread(pieces: list[bytes], budget: int) -> list[bytes]:
    """Pieces of about so many bytes, never more, spread evenly over all."""
    total = sum(map(len, pieces))
    if total <= budget:
        return pieces
    kept: list[bytes] = []
    used = seen = 0
    for piece in pieces:
        seen += len(piece)
        if used + len(piece) <= budget * seen / total:
            kept.append(piece)
            used += len(piece)
    return kept


def read_pack(path: Path) -> tuple[dict[str, list[np.ndarray]], dict[str, float]]:
    """Pictures uint8 (H, W, 3) by source, those that are judged by among them, and the shares.

    raises  InputError where the file is no pack, or a damaged one
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = json.loads(archive.read(RECORD))
            if record["format"] != FORMAT:
                raise InputError(f"{path}: {record['format']!r:.60}, this version reads {FORMAT}")
            names = [name for name in archive.namelist() if name != RECORD][:MAX_PICTURES]
            pictures: dict[str, list[np.ndarray]] = {}
            for name in names:
                pictures.setdefault(name.split("/")[0], []).append(decoded(archive.read(name)))
            shares = {str(source): float(share) for source, share in record["shares"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: no pack of tiles, or a damaged one ({error})") from error
    missing = [source for source in (*shares, "held_out") if not pictures.get(source)]
    if missing:
        raise InputError(f"{path}: no picture of {missing[0]!r}; pack the tiles again")
    return pictures, shares


def decoded(content: bytes) -> np.ndarray:
    with open_picture(io.BytesIO(content)) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"a picture of {picture.width}x{picture.height} px")
        return np.asarray(picture.convert("RGB"))


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
        raise InputError(f"{root}: too few pictures; at least {OWN_HELD_OUT}")
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
    """Any other folder's pictures as one source; every twentieth is judged by."""
    files = picture_files(root)
    held_out = files[OWN_HELD_OUT - 1 :: OWN_HELD_OUT][:OWN_JUDGED]
    return {OWN: [file for file in files if file not in set(held_out)]}, held_out


def picture_files(path: Path) -> list[Path]:
    """Pictures below a folder, sorted, hidden ones left out; a file is itself."""
    if path.is_file():
        return [path]
    suffixes = picture_suffixes()
    found = (file for file in path.rglob("*") if "/." not in f"/{file.relative_to(path)}")
    return sorted(file for file in found if file.suffix.lower() in suffixes)


def attribution_of(names: Iterable[str]) -> tuple[str, ...]:
    """What the licences of these sources ask to be said, a line each, none twice."""
    lines = [SOURCES[name].attribution for name in names if name in SOURCES]
    return tuple(dict.fromkeys(line for line in lines if line))


def shares_of(sources: dict[str, list[Path]]) -> dict[str, float]:
    return {name: SOURCES[name].share if name in SOURCES else 1.0 for name in sources}
