"""The record every source yields and every writer takes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from latentds.store.format import patch_key


class Place(NamedTuple):
    """Where a patch lies, known before its pixels are read; the same words as a Patch's."""

    x_px_level0: int | None
    y_px_level0: int | None
    size_px_level0: int | None
    mpp: float | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """An image cut from somewhere, and where.

    image            uint8 (H, W, 3) RGB
    source           path of the file it came from, relative to the input folder
    source_encoding  how that file was coded, for example png or jpeg:q=75:4:2:0
    label, slide     names, None where unknown
    x_px_level0      left edge in pixels of level 0 (of the source picture for plain images), None
                     where unknown
    y_px_level0      top edge, likewise
    size_px_level0   width of the region in those pixels
    mpp              micrometres a pixel of `image`, None where unknown
    mask_png         lossless mask (H, W) as PNG bytes, None for none
    """

    image: np.ndarray
    source: str
    source_encoding: str
    label: str | None = None
    slide: str | None = None
    x_px_level0: int | None = None
    y_px_level0: int | None = None
    size_px_level0: int | None = None
    mpp: float | None = None
    mask_png: bytes | None = None

    @property
    def key(self) -> str:
        """Dot-free ASCII, unique over the data set, derived from source and place."""
        return patch_key(self.source, self.x_px_level0, self.y_px_level0)
