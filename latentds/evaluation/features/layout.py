"""Names and attributes of a folder of features: TRIDENT's, and CLAM's where they are asked for."""
# N patches of a slide

from __future__ import annotations

import dataclasses
import io
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from latentds.core.storage import write_atomically
from latentds.errors import InputError
from latentds.evaluation.features.feature_files import FeatureFile, write_coordinates

RECORD = "features.json"
SUFFIX, COORDS_SUFFIX = ".h5", "_patches.h5"
MAX_NAME_BYTES = 240  # file systems take 255; `_patches.h5.tmp` is to be added
# A leading dot hides a file, the others part paths or are refused by some system; % is the escape.
ODD = re.compile(r"^\.|[%/\\:*?\"<>|\x00-\x1f\x7f]")
# TRIDENT v0.3, trident/wsi_objects/WSI.py: micrometres a pixel below which a slide has that power
MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))


@dataclasses.dataclass(frozen=True)
class FeaturePlaces:
    """Where the files of an embedder lie in a folder.

    out       the folder
    embedder  its name
    """

    out: Path
    embedder: str

    @property
    def features(self) -> Path:
        """Folder of a feature file a slide, `features_<embedder>`."""
        return self.out / f"features_{plain(self.embedder)}"

    @property
    def coords(self) -> Path:
        """Folder of a file of coordinates a slide, `patches`."""
        return self.out / "patches"

    @property
    def clam(self) -> Path:
        """Folder of CLAM's layout, `clam_<embedder>`."""
        return self.out / f"clam_{plain(self.embedder)}"

    def features_file(self, slide: str) -> Path:
        return self.features / f"{file_name(slide)}{SUFFIX}"

    def coords_file(self, slide: str) -> Path:
        return self.coords / f"{file_name(slide)}{COORDS_SUFFIX}"


def plain(embedder: str) -> str:
    """An embedder's name as part of a folder's: what is odd in it becomes a hyphen."""
    return re.sub(r"[^\w.+=-]+", "-", embedder)


def file_name(slide: str) -> str:
    """A slide's name as a file's, without suffix; odd characters as %XX, so names stay apart."""
    name = ODD.sub(lambda odd: f"%{ord(odd[0]):02X}", slide)
    if not name or len(name.encode()) > MAX_NAME_BYTES:
        raise InputError(
            f"slide {slide[:80]!r}: {len(name.encode())} bytes as a file name; 1 to "
            f"{MAX_NAME_BYTES} are possible"
        )
    return name


def slide_name(path: Path) -> str:
    """The slide that a file of ours is named after."""
    return unquote(path.name.removesuffix(SUFFIX))


def coords_attributes(
    slide: str, coords: np.ndarray, size_px: int, patch_px: int, mpp: float
) -> dict[str, Any]:
    """TRIDENT's attributes of `coords`.

    coords    int64 (N, 2) at level 0
    size_px   width of a patch at level 0, 0 where unknown
    patch_px  width of a patch in its own pixels
    mpp       micrometres a pixel of the patch, NaN where unknown

    A magnification that nothing tells is 0, and so are the slide's width and height, which no set
    of patches records.
    """
    size_px = size_px or patch_px
    return {
        "patch_size": patch_px,
        "patch_size_level0": size_px,
        "level0_magnification": magnification(mpp * patch_px / size_px),
        "target_magnification": magnification(mpp),
        "overlap": overlap_px(coords, size_px, patch_px),
        "name": slide,
        "savetodir": "patches",
        "level0_width": 0,
        "level0_height": 0,
    }


def magnification(mpp: float) -> int:
    """The power TRIDENT gives a resolution, 0 where that is unknown or coarser than 2.4 um."""
    if math.isnan(mpp):
        return 0
    return next((power for limit, power in MAGNIFICATIONS if mpp < limit), 0)


def overlap_px(coords: np.ndarray, size_px: int, patch_px: int) -> int:
    """Pixels of a patch that its neighbour in the same row shows too, 0 where they do not touch."""
    rows = coords[np.lexsort((coords[:, 0], coords[:, 1]))]
    steps = np.diff(rows, axis=0)
    along = steps[(steps[:, 1] == 0) & (steps[:, 0] > 0), 0]
    step = int(along.min()) if len(along) else size_px
    return max(0, round((size_px - step) * patch_px / size_px))


def add_clam(places: FeaturePlaces, slide: str, patch_px: int) -> None:
    """Make a slide's files for CLAM from its feature file, those that are missing.

    h5_files takes no room: it is the same file by another name, where the disk allows it. A tensor
    is held in memory as a whole.
    """
    import torch

    source = places.features_file(slide)
    tensor = places.clam / "pt_files" / f"{source.stem}.pt"
    linked = places.clam / "h5_files" / source.name
    coords = places.clam / "patches" / source.name
    if tensor.exists() and linked.exists() and coords.exists():
        return
    with FeatureFile(source) as file:
        size = int(file.attributes["coords"].get("patch_size_level0", patch_px))
        # CLAM's patch_size counts pixels of patch_level: patches of half the resolution are 512 px
        # of level 0 here, which TRIDENT calls 256. A slide's size is not known.
        attributes = {
            "patch_size": size or patch_px, "patch_level": 0, "downsample": (1.0, 1.0),
            "downsampled_level_dim": (0, 0), "level_dim": (0, 0), "name": slide,
            "save_path": "patches",
        }  # fmt: skip
        write_coordinates(coords, file.coords(), attributes)
        content = io.BytesIO()
        torch.save(torch.from_numpy(file.features()), content)
    linked.unlink(missing_ok=True)
    linked.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, linked)
    except OSError:  # a file system without links
        shutil.copyfile(source, linked)
    write_atomically(tensor, content.getvalue())
