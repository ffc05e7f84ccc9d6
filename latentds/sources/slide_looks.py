"""What a person is shown of a slide: its levels, small, tissue outlined, patches marked."""
# H W pixels, n patches

from __future__ import annotations

import dataclasses
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

LOOK_PX = 320  # longest edge: 5 to 12 KB as JPEG
QUALITY = 60
OUTLINE = (0, 120, 60)
PATCH = (30, 90, 220)
FILL_ALPHA, LINE_ALPHA = 40, 150  # of 255
LEAST_CELL_PX = 5  # smaller cells have no lines, or nothing else would be seen


class Overview(NamedTuple):
    """A slide as its tissue was looked for: uint8 (H, W, 3), its scale to level 0, bool (H, W)."""

    pixels: np.ndarray
    factor: float
    mask: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlideLook:
    """What is known of a slide once its patches were chosen.

    picture_jpeg  of its levels, never of its label or macro images; None where none is small enough
    mpp_level0, mpp  micrometres a pixel of level 0 and of patches, None where unknown
    size_px       of a patch, in pixels of level 0
    tissue        share of it that is tissue, None where the rule does not tell
    places        places of patches that were looked at
    left_out      why of places no patch was taken, a sentence each, without names
    """

    picture_jpeg: bytes | None = None
    mpp_level0: float | None = None
    mpp: float | None = None
    size_px: int | None = None
    tissue: float | None = None
    places: int = 0
    left_out: tuple[str, ...] = ()


def draw_look(overview: np.ndarray, mask: np.ndarray | None, boxes: np.ndarray) -> bytes:
    """JPEG bytes of an overview with what was taken of it; no metadata.

    overview  uint8 (H, W, 3)
    mask      bool (h, w), what of it is tissue, of any size; None for no outline
    boxes     float (n, 4), left, top, right, bottom of the patches, in the overview's pixels
    """
    height, width = overview.shape[:2]
    small = Image.fromarray(overview)
    small.thumbnail((LOOK_PX, LOOK_PX), Image.Resampling.BOX)
    marks = Image.new("RGBA", small.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(marks)
    scaled = boxes * np.tile([small.width / width, small.height / height], 2)
    has_lines = len(scaled) and scaled[0, 2] - scaled[0, 0] >= LEAST_CELL_PX
    line = (*PATCH, LINE_ALPHA) if has_lines else None
    for left, top, right, bottom in scaled.tolist():
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        draw.rectangle(corners, fill=(*PATCH, FILL_ALPHA), outline=line)
    if mask is not None:
        marks.paste((*OUTLINE, 255), mask=outline_of(mask, small.size))
    small.paste(marks, mask=marks.getchannel("A"))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue()


def outline_of(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The rim of a mask's parts at another size (width, height), as an image of mode L."""
    full = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    inside = np.pad(np.asarray(full) >= 128, 1)
    middle = inside[1:-1, 1:-1]
    around = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return Image.fromarray((middle & ~around).astype(np.uint8) * 255)
