"""Where views lie: boxes, mirror images and turns, drawn from the patches' seeds."""
# V views, B patches, D draws, H W pixels of a patch

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentds.core.randomness import uniform_each
from latentds.errors import ShapeError

TRIES = 10  # torchvision's RandomResizedCrop; then a central box
# What each number of a view decides, in this order; new ones go to the end: those before stay.
DRAWS = {
    **{"area": TRIES, "ratio": TRIES, "place": 2, "mirror": 1, "turn": 1},
    **{"jitter_p": 1, "jitter": 4, "stain_p": 1, "stain": 3, "stain_shift": 3},
    **{"grey": 1, "blur_p": 1, "blur": 1, "solarize": 1},
}


class Draws:
    """Random numbers in [0, 1) of every view of every patch.

    values  float32 (V, B, all D)
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def of(cls, seeds: Tensor, views: Sequence[str]) -> Draws:
        """Those of seeds int64 (B,), `batch.seeds`.

        views  names ("global 0"): a view's numbers do not depend on which others there are
        """
        names = [f"view {name}" for name in views]
        return cls(uniform_each(seeds, names, sum(DRAWS.values())))

    def part(self, views: slice) -> Draws:
        return Draws(self.values[views])

    def __getitem__(self, name: str) -> Tensor:
        """float32 (V, B, D), or (V, B) where one number is drawn."""
        start = 0
        for other, count in DRAWS.items():
            if other == name:
                part = self.values[..., start : start + count]
                return part[..., 0] if count == 1 else part
            start += count
        raise KeyError(name)


@dataclasses.dataclass(frozen=True, eq=False)
class Boxes:
    """What every view shows of its patch, int64 (V, B) each.

    top, left, height, width  pixels of the patch
    mirrored                  bool, left and right swapped
    turns                     then so many quarter turns, counter-clockwise, 0 to 3
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    mirrored: Tensor
    turns: Tensor

    def part(self, views: slice) -> Boxes:
        return Boxes(*(getattr(self, field.name)[views] for field in dataclasses.fields(self)))


def draw_boxes(
    draws: Draws,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    has_turns: bool,
) -> Boxes:
    """Boxes of torchvision's RandomResizedCrop, all its tries drawn at once.

    size   (H, W) of the patches
    scale  part of the area, from and to
    ratio  width to height, from and to
    """
    height, width, has_fitted = fitting(draws, size, scale, ratio)
    boxes = placed(draws, height, width, size, flip, has_turns)
    top, left = ((edge - part) // 2 for edge, part in zip(size, (height, width), strict=True))
    return dataclasses.replace(
        boxes,
        top=torch.where(has_fitted, boxes.top, top),
        left=torch.where(has_fitted, boxes.left, left),
    )


def native_boxes(
    draws: Draws, size: tuple[int, int], edge_px: int, flip: float, has_turns: bool
) -> Boxes:
    """Boxes of `edge_px` each way: crops that are not resized."""
    if edge_px > min(size):
        raise ShapeError(
            f"crops of {edge_px} px without resizing from patches of {size[1]}x{size[0]} px; "
            "give a scale, or smaller crops"
        )
    edge = torch.full_like(draws["mirror"], edge_px, dtype=torch.int64)
    return placed(draws, edge, edge, size, flip, has_turns)


def fitting(
    draws: Draws, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Height and width (V, B) of the first try that fits the patch, else of a central box.

    The third tensor, bool (V, B), says where one has fitted.
    """
    rows, columns = size
    area = rows * columns * spread(draws["area"].double(), scale)
    shape = spread(draws["ratio"].double(), (math.log(ratio[0]), math.log(ratio[1]))).exp()
    widths, heights = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (widths > 0) & (widths <= columns) & (heights > 0) & (heights <= rows)
    first = fits.int().argmax(-1, keepdim=True)
    has_fitted = fits.any(-1)
    fallback = central_box(size, ratio)
    chosen = (heights.gather(-1, first)[..., 0], widths.gather(-1, first)[..., 0])
    height, width = (
        torch.where(has_fitted, found, other).long()
        for found, other in zip(chosen, fallback, strict=True)
    )
    return height, width, has_fitted


def central_box(size: tuple[int, int], ratio: tuple[float, float]) -> tuple[float, float]:
    """(height, width) of the largest box of a ratio that is allowed."""
    rows, columns = size
    if columns / rows < ratio[0]:
        return float(max(round(columns / ratio[0]), 1)), float(columns)
    if columns / rows > ratio[1]:
        return float(rows), float(max(round(rows * ratio[1]), 1))
    return float(rows), float(columns)


def placed(
    draws: Draws, height: Tensor, width: Tensor, size: tuple[int, int], flip: float, has_turns: bool
) -> Boxes:
    """Boxes of a size put anywhere in the patch, with mirror images and turns."""
    place = draws["place"].double()
    turns = (draws["turn"] * 4).long() if has_turns else torch.zeros_like(height)
    return Boxes(
        top=(place[..., 0] * (size[0] - height + 1)).long(),
        left=(place[..., 1] * (size[1] - width + 1)).long(),
        height=height,
        width=width,
        mirrored=draws["mirror"] < flip,
        turns=turns,
    )


def spread(draws: Tensor, limits: tuple[float, float]) -> Tensor:
    """Numbers in [0, 1) spread over `limits`."""
    return limits[0] + draws * (limits[1] - limits[0])
