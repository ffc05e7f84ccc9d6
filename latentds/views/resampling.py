"""Resized crops of many patches at once: two matrix products a view, one matrix a patch.

Rows of the matrices are the weights of an antialiased resize (PIL's, and torch's `antialias=True`)
of the patch's own box; mirror images and half turns are their rows in reverse order.
"""
# V views, B patches, N = V * B, H W pixels of a patch, P pixels of a crop, K taps

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentds.views.boxes import Boxes

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # half width of the kernel at scale 1
CUBIC = -0.5  # Keys' a, as PIL and torch's antialiased bicubic have it; -0.75 without antialiasing


def resized_crops(images: Tensor, boxes: Boxes, edge_px: int, kind: str) -> Tensor:
    """Crops (V, B, C, P, P) of images (B, C, H, W), of their dtype, not clamped.

    A bicubic resize overshoots at edges, as torchvision's does for floats.
    """
    batch, channels, rows, columns = images.shape
    views = len(boxes.top)
    # A quarter turn is a mirror image and a transposition; half of them reverse rows as well.
    is_odd = boxes.turns % 2 == 1
    reverse_x = boxes.mirrored ^ ((boxes.turns == 1) | (boxes.turns == 2))
    reverse_y = boxes.turns >= 2
    across = taps(boxes.left, boxes.width, columns, edge_px, kind, reverse_x)
    down = taps(boxes.top, boxes.height, rows, edge_px, kind, reverse_y)
    crops = images.new_empty((views, batch, channels, edge_px, edge_px))
    for view in range(views):  # each has its matrices for a moment only
        x_BPW = matrix(across[0][view], across[1][view], columns, images.dtype)
        y_BPH = matrix(down[0][view], down[1][view], rows, images.dtype)
        flat = images.reshape(batch, channels * rows, columns)
        narrow = torch.bmm(flat, x_BPW.transpose(1, 2)).view(batch, channels, rows, edge_px)
        crop = torch.matmul(y_BPH[:, None], narrow)
        turned = is_odd[view][:, None, None, None]
        crops[view] = torch.where(turned, crop.transpose(-1, -2), crop)
    return crops


def taps(
    start: Tensor, length: Tensor, size: int, edge_px: int, kind: str, reverse: Tensor
) -> tuple[Tensor, Tensor]:
    """First pixel int64 (V, B, P) and weights float32 (V, B, P, K) of every pixel of the crops.

    start, length  (V, B), of the box along this axis
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
    return first, weights / weights.sum(-1, keepdim=True)


def kernel(distance: Tensor, kind: str) -> Tensor:
    """Triangle, or Keys' cubic, of distances in pixels of the coarser grid."""
    x = distance.abs()
    if kind == "bilinear":
        return (1 - x).clamp(min=0)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = CUBIC * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def matrix(first: Tensor, weights: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Weights (B, P, K) from pixel `first` (B, P) on as rows of matrices (B, P, size)."""
    columns = first[..., None] + torch.arange(weights.shape[-1], device=first.device)
    dense = torch.zeros((*first.shape, size), dtype=dtype, device=first.device)
    return dense.scatter_(-1, columns, weights.to(dtype))
