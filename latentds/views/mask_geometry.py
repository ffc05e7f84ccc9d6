"""Crops, resizes, flips and turns that do the same to an image and to its lossless mask.

Both take the centre of output pixel i from the place (i + 1/2) * scale of the input: images by
linear interpolation with a kernel as wide as the scale (antialiased), masks by the pixel that holds
that place. So a mask's values stay as they are, and image and mask differ nowhere but within
`boundary_px` of a boundary. Where things are cut is whole pixels, padding is at the right and
bottom and mirrors both alike.
"""
# B images, H W pixels, h w pixels of a view

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional

from latentds.core.randomness import uniform
from latentds.errors import ShapeError
from latentds.views.boxes import Draws, draw_boxes

RATIO = (3 / 4, 4 / 3)  # width over height of a random box, from and to


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """A box of an image, resized, then flipped, then turned.

    top, left, height, width   the box in pixels
    size_px                    (h, w) that it is resized to
    is_mirrored, is_upended    flipped left to right, top to bottom
    quarter_turns              counterclockwise, 0 to 3; odd ones swap h and w
    """

    top: int
    left: int
    height: int
    width: int
    size_px: tuple[int, int]
    is_mirrored: bool = False
    is_upended: bool = False
    quarter_turns: int = 0

    def image(self, image: Tensor) -> Tensor:
        """float (C, h, w) in [0, 1] of an image (C, H, W), uint8 or float in [0, 1]."""
        cut = self.cut(image)
        pixels = cut.float() / 255 if cut.dtype == torch.uint8 else cut
        return self.oriented(resize_image(pixels, self.size_px))

    def mask(self, mask: Tensor) -> Tensor:
        """(h, w) of a mask (H, W), values unchanged."""
        return self.oriented(resize_mask(self.cut(mask), self.size_px))

    def cut(self, pixels: Tensor) -> Tensor:
        """The box; ShapeError where it reaches beyond the image."""
        size = tuple(pixels.shape[-2:])
        ends = self.top + self.height, self.left + self.width
        if min(self.top, self.left) < 0 or ends[0] > size[0] or ends[1] > size[1]:
            raise ShapeError(
                f"a box of {self.height}x{self.width} px at {self.top}, {self.left} reaches "
                f"beyond an image of {size[0]}x{size[1]}"
            )
        return pixels[..., self.top : ends[0], self.left : ends[1]]

    def oriented(self, pixels: Tensor) -> Tensor:
        axes = [-1] * self.is_mirrored + [-2] * self.is_upended
        flipped = pixels.flip(axes) if axes else pixels
        return torch.rot90(flipped, self.quarter_turns, (-2, -1)).contiguous()

    @property
    def boundary_px(self) -> int:
        """How far from a boundary of the mask image and mask may differ, in pixels of the view."""
        scales = (self.size_px[0] / self.height, self.size_px[1] / self.width)
        return math.ceil(max(1.0, *scales))


def whole(image_px: tuple[int, int], size_px: tuple[int, int]) -> View:
    return View(top=0, left=0, height=image_px[0], width=image_px[1], size_px=size_px)


def random_views(
    seeds: Tensor,
    image_px: tuple[int, int],
    size_px: tuple[int, int],
    *,
    scale: tuple[float, float],
    flip: float = 0.0,
    turn: float = 0.0,
) -> list[View]:
    """A view for every seed: a function of the seed alone, whatever batch or rank it is in.

    seeds     int64 (B,)
    image_px  (H, W) of the images
    size_px   (h, w) of the views, the same for all: with turns, h == w
    scale     share of the image's area that a box has, from and to
    flip      share that is flipped: left to right, top to bottom, or both
    turn      share that is turned by 0 to 3 quarters
    """
    if turn and size_px[0] != size_px[1]:
        raise ShapeError(f"turned views of {size_px[0]}x{size_px[1]} px differ in shape; h == w")
    boxes = draw_boxes(Draws.of(seeds, ["mask"]), image_px, scale, RATIO, 0.0, False)
    places = torch.cat([boxes.top, boxes.left, boxes.height, boxes.width]).T.tolist()
    views = []
    for place, numbers in zip(places, uniform(seeds, "mask_geometry", 4).tolist(), strict=True):
        top, left, height, width = place
        flipped, which, turned, quarters = numbers
        kind = 1 + int(which * 3) if flipped < flip else 0  # 1 mirrored, 2 upended, 3 both
        views.append(
            View(
                top=top,
                left=left,
                height=height,
                width=width,
                size_px=size_px,
                is_mirrored=kind in (1, 3),
                is_upended=kind in (2, 3),
                quarter_turns=int(quarters * 4) if turned < turn else 0,
            )
        )
    return views


def resize_image(image: Tensor, size_px: tuple[int, int]) -> Tensor:
    """float (..., h, w) of a float image (C, H, W) or (B, C, H, W): linear, antialiased."""
    if tuple(image.shape[-2:]) == size_px:
        return image
    batch = image if image.ndim == 4 else image[None]
    resized = functional.interpolate(
        batch, size_px, mode="bilinear", align_corners=False, antialias=True
    )
    return resized if image.ndim == 4 else resized[0]


def resize_mask(mask: Tensor, size_px: tuple[int, int]) -> Tensor:
    """(..., h, w) of a mask (..., H, W): the input pixel that holds each output pixel's centre."""
    rows, columns = (
        nearest(old, new).to(mask.device) for old, new in zip(mask.shape[-2:], size_px, strict=True)
    )
    return mask[..., rows[:, None], columns]


def nearest(old: int, new: int) -> Tensor:
    """int64 (new,): floor((i + 1/2) * old / new), exact for any size."""
    return (2 * torch.arange(new) + 1) * old // (2 * new)


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """Pixels (..., H, W) mirrored at the right and bottom up to multiples; cut back by `[:H, :W]`.

    The edge pixel is not repeated, as in numpy's "reflect"; any image of 1 px or more.
    """
    rows, columns = (
        mirrored(old, -(-old // multiple) * multiple).to(pixels.device) for old in pixels.shape[-2:]
    )
    return pixels[..., rows[:, None], columns]


def mirrored(old: int, new: int) -> Tensor:
    """int64 (new,): indices that run to and fro between 0 and old - 1."""
    period = max(2 * (old - 1), 1)
    places = torch.arange(new) % period
    return torch.minimum(places, period - places) if old > 1 else torch.zeros_like(places)
