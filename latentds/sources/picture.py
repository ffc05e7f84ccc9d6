"""A picture as a source finds it: a file, a slide, an archive's member; its header, its mask."""
# H W pixels

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentds.codecs.formats import DECODE_ERRORS
from latentds.core.storage import open_picture
from latentds.errors import UnusableError

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
ORIENTATION = 274  # EXIF tag; 2 to 8 are turned or mirrored
Regions = Sequence[tuple[int, int]]  # x and y of patches in their picture's own pixels
MIXED_CHUNKS = 4  # pictures of so many chunks are shuffled among each other


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that was found, and what its name, its folders or a table say about it.

    source       path relative to the input folder (posix), inside an archive `archive/member`
    split        train, val, test, ...
    label, slide names, None where unknown
    x, y         left and top edge of the whole picture in pixels of level 0, None where unknown
    mpp          micrometres a pixel, None where unknown
    size_px      width of the picture in pixels of level 0, None where that is its own
    mask         path of its mask relative to the input folder, None for none
    patient      name, None where it is the slide's or unknown; for splits only, stored nowhere
    span         (offset, size) of its bytes in an archive, None for a file of its own
    """

    source: str
    split: str
    label: str | None = None
    slide: str | None = None
    x: int | None = None
    y: int | None = None
    mpp: float | None = None
    size_px: int | None = None
    mask: str | None = None
    patient: str | None = None
    span: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Header:
    """What a picture says before a pixel is decoded.

    size_px     (H, W)
    mode        Pillow mode
    encoding    how it is coded, for example png or jpeg:q=75:4:2:0
    bytes       of the file
    mask_bytes  of its mask's file, 0 for none
    orientation of EXIF, which is not applied; 1 for none
    """

    size_px: tuple[int, int]
    mode: str
    encoding: str
    bytes: int
    mask_bytes: int = 0
    orientation: int = dataclasses.field(default=1, compare=False)  # no part of an identity


@dataclasses.dataclass(frozen=True)
class Listing:
    """Pictures in a fixed order, and how many other files were passed over.

    notes    what was assumed, and what was found and not read, in sentences without an end
    others   the files passed over
    classes  all label names in the source's own order, whose places are its numbers; else empty
    """

    pictures: tuple[Picture, ...]
    ignored: int = 0
    notes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


def orientation_of(image: Image.Image) -> int:
    """Orientation of an opened picture with EXIF, 1 where it has none or it cannot be read.

    A TIFF's is no such EXIF: Pillow applies it.
    """
    try:
        found: Any = image.getexif().get(ORIENTATION)
    except DECODE_ERRORS:  # no reason to lose a picture
        return 1
    return found if found in range(2, 9) else 1


def find_mask(folder: Path, source: str, size_px: tuple[int, int]) -> Path:
    """The mask of a picture below `folder`, its header checked; InputError (without the name)."""
    paths = [(folder / source).with_suffix(suffix) for suffix in MASK_SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UnusableError(
            f"has no mask under --masks ({Path(source).with_suffix('.png')})", "mask"
        )
    with opened_mask(path, size_px):
        return path


@contextlib.contextmanager
def opened_mask(path: Path, size_px: tuple[int, int]) -> Iterator[Image.Image]:
    """A mask of 8-bit grey or palette and of the picture's size; UnusableError else."""
    try:
        with open_picture(path) as image:
            if image.mode not in ("L", "1", "P"):
                raise UnusableError(
                    f"its mask is of mode {image.mode}; 8-bit grey or palette masks only", "mask"
                )
            if image.size != size_px[::-1]:
                raise UnusableError(
                    f"its mask is {image.size} px, the picture {size_px[::-1]}", "mask"
                )
            yield image
    except DECODE_ERRORS as error:
        raise UnusableError(f"its mask cannot be read ({first_line(error)})", "mask") from error


def read_mask(path: Path, size_px: tuple[int, int]) -> np.ndarray:
    """Mask uint8 (H, W) of just that size, values untouched; InputError (without the name)."""
    with opened_mask(path, size_px) as image:
        # A palette's indices are the classes; its colours are for looking at.
        return np.asarray(image).astype(np.uint8) * (255 if image.mode == "1" else 1)


def first_line(error: Exception) -> str:
    """An error's first line; Pillow repeats the path in some, which a manifest must not carry."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        line = error.strerror
    return "not a picture Pillow knows" if line.startswith("cannot identify image") else line
