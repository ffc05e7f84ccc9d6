"""A picture as a source finds it: a file, a slide, an archive's member; its header; a listing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
    """

    size_px: tuple[int, int]
    mode: str
    encoding: str
    bytes: int
    mask_bytes: int = 0


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
