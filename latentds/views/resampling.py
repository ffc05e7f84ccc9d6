"""Resized crops of many patches at once: two matrix products, a matrix each view of a patch.

Rows of the matrices are the weights of an antialiased resize (PIL's, and torch's `antialias=True`)
of the patch's own box; mirror images and half turns are their rows in reverse order.
"""
# V views, B patches, N = V * B, H W pixels of a patch, P pixels of a crop, K taps

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from latentds.views.boxes import Boxes

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # half width of the kernel at scale 1
HELD_BYTES = 1 << 28  # of matrices, crops that are resized across, and crops before their turns
CUBIC = -0.5  # Keys' a, as PIL and torch's antialiased bicubic have it; -0.75 without antialiasing


def resized_crops(images: Tensor, boxes: Boxes, edge_px: int, kind: str) -> Tensor:
    """Crops (V, B, C, P, P) of images (B, C, H, W), of their dtype, not clamped.

    A bicubic resize overshoots at edges, as torchvision's does for floats.
    """
    batch, channels, rows, columns = images.shape
    # A quarter turn is a mirror image and a transposition; half of them reverse rows as well.
    is_odd = (boxes.turns % 2 == 1)[..., None, None, None]
    across, down = both_taps(boxes, images, edge_px, kind)
    values = channels * rows + rows + columns + 2 * channels * edge_px
    view_bytes = batch * edge_px * values * images.element_size()
    step = max(HELD_BYTES // max(view_bytes, 1), 1)
    parts = [images.new_empty((0, batch, channels, edge_px, edge_px))]
    for start in range(0, len(is_odd), step):
        some = slice(start, start + step)
        xy = resized(images, across.part(some), down.part(some))
        turned, upright = xy.permute(1, 0, 3, 2, 4), xy.permute(1, 0, 3, 4, 2)
        parts.append(torch.where(is_odd[some], turned, upright))
    return torch.cat(parts) if len(parts) != 2 else parts[1].contiguous()


def resized(images: Tensor, across: Taps, down: Taps) -> Tensor:
    """Crops (B, V, P, C, P), x before y, of images (B, C, H, W): two products for all views.

    A patch's views stand side by side in one matrix, so that its pixels are not copied for each.
    """
    batch, channels, rows, columns = images.shape
    x_BVPW, y_BVPH = across.matrices(columns, images.dtype), down.matrices(rows, images.dtype)
    views, edge_px = x_BVPW.shape[1:3]
    pixels = images.reshape(batch, channels * rows, columns).transpose(1, 2)
    narrow = torch.bmm(x_BVPW.flatten(1, 2), pixels)  # (B, V * P, C * H)
    narrow = narrow.view(batch * views, edge_px * channels, rows)
    crops = torch.bmm(narrow, y_BVPH.flatten(0, 1).transpose(1, 2))
    return crops.view(batch, views, edge_px, channels, edge_px)


@dataclasses.dataclass(frozen=True, eq=False)
class Taps:
    """What every pixel of the crops is the weighted sum of, along one axis.

    first    int64 (V, B, P), the first pixel of the patch
    weights  float32 (V, B, P, K), from there on
    """

    first: Tensor
    weights: Tensor

    def part(self, views: slice) -> Taps:
        return Taps(self.first[views], self.weights[views])

    def matrices(self, size: int, dtype: torch.dtype) -> Tensor:
        """The weights as rows of dense matrices (B, V, P, size)."""
        first, weights = self.first.transpose(0, 1), self.weights.transpose(0, 1)
        columns = first[..., None] + torch.arange(weights.shape[-1], device=first.device)
        dense = torch.zeros((*first.shape, size), dtype=dtype, device=first.device)
        return dense.scatter_(-1, columns, weights.to(dtype))


def both_taps(boxes: Boxes, images: Tensor, edge_px: int, kind: str) -> tuple[Taps, Taps]:
    """Those across and down; of square images in one go, for on a GPU it is the calls that cost."""
    rows, columns = images.shape[-2:]
    turned = (boxes.turns == 1) | (boxes.turns == 2)
    across = (boxes.left, boxes.width, boxes.mirrored ^ turned)
    down = (boxes.top, boxes.height, boxes.turns >= 2)
    if rows != columns:
        return taps(*across, columns, edge_px, kind), taps(*down, rows, edge_px, kind)
    start, length, reverse = (torch.cat(pair) for pair in zip(across, down, strict=True))
    both = taps(start, length, reverse, rows, edge_px, kind)
    views = len(boxes.top)
    return both.part(slice(views)), both.part(slice(views, None))


def taps(
    start: Tensor, length: Tensor, reverse: Tensor, size: int, edge_px: int, kind: str
) -> Taps:
    """Taps of an antialiased resize.

    start, length  (V, B), of the box along this axis
    reverse        bool (V, B), the last pixel first
    size           pixels of the patch along it
    """
    support = SUPPORT[kind]
    # A box is no larger than the patch: that bounds the taps without asking the device.
    count = min(math.ceil(2 * support * max(size / edge_px, 1.0)) + 1, size)
    scale = (length.float() / edge_px)[..., None]
    stretch = scale.clamp(min=1)
    place = torch.arange(edge_px, device=start.device)
    place = torch.where(reverse[..., None], edge_px - 1 - place, place)
    centre = scale * (place + 0.5)  # in the box
    first = (centre - support * stretch + 0.5).floor().long() + start[..., None]
    first = first.clamp(min=0).clamp(max=size - count)
    pixels = first[..., None] + torch.arange(count, device=start.device)
    inside = pixels - start[..., None, None]  # counted from the box
    weights = kernel((inside + 0.5 - centre[..., None]) / stretch[..., None], kind)
    in_box = (inside >= 0) & (inside < length[..., None, None])
    weights = torch.where(in_box, weights, 0.0)
    return Taps(first, weights / weights.sum(-1, keepdim=True))


def kernel(distance: Tensor, kind: str) -> Tensor:
    """Triangle, or Keys' cubic, of distances in pixels of the coarser grid."""
    x = distance.abs()
    if kind == "bilinear":
        return (1 - x).clamp(min=0)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = CUBIC * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
