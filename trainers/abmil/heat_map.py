"""What a bag model looked at: a slide's attention over its patches, as a picture and a table."""
# N patches, H W pixels

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from latentds_trainers.abmil.config import AbmilConfig
from latentds_trainers.crossval.cross_validation import FoldOutcome
from torch.nn import functional

from latentds.core.storage import write_atomically
from latentds.errors import InputError, missing_extra
from latentds.evaluation.features.layout import file_name
from latentds.evaluation.patchsets.patches import PatchSet
from latentds.sources.csv_tables import write_table

LONGEST_PX = 1600  # edge of the slide in the picture
CHUNK = 64  # patches decoded at a time
SHARES = (0.1, 10.0)  # ends of the colour bar, as multiples of an even share
TICKS = (0.1, 0.3, 1, 3, 10)
BLANK = 255


def place_patches(
    coords: np.ndarray, size_px: int, origin: np.ndarray, scale: float
) -> tuple[list[tuple[slice, slice]], tuple[int, int]]:
    """Rows and columns of every patch in the picture, and the picture's (H, W).

    coords, size_px  corners (N, 2) and edge of patches in pixels of level 0

    Where a patch lies above or left of the picture, its rows or columns are none.
    """
    near = np.round((coords - origin) * scale).astype(np.int64)
    far = np.round((coords + size_px - origin) * scale).astype(np.int64)
    far = np.maximum(far, near + 1)
    width, height = far.max(0).tolist()
    edges = np.concatenate([near, far], 1).clip(0).tolist()
    boxes = [(slice(top, bottom), slice(left, right)) for left, top, right, bottom in edges]
    return boxes, (height, width)


def patch_edge(slide: str, coords: np.ndarray, recorded: int | None) -> int:
    """Edge of a patch in pixels of level 0: as recorded, else the smallest step of the grid.

    raises  InputError where neither tells, or patches do not say where they lie
    """
    if (coords < 0).any():
        raise InputError(f"{slide}: patches without x and y; a heat map needs them")
    if recorded:
        return recorded
    steps = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
    if not len(steps):
        raise InputError(
            f"{slide}: its features do not say how large a patch is on the slide, and one patch "
            "does not show it; give --data"
        )
    return int(steps.min())


def slide_thumbnail(patches: PatchSet, slide: str) -> tuple[np.ndarray, np.ndarray, float]:
    """The slide put together from its patches: uint8 (H, W, 3), origin (2,), pixels a level-0 one.

    Where no patch is, it is white.
    """
    own = patches.of_slide(slide)
    coords = np.stack([own.table.x, own.table.y], 1)
    edge = patch_edge(slide, coords, int(own.table.size_px.max()))
    origin, scale = frame_of(coords, edge)
    boxes, size = place_patches(coords, edge, origin, scale)
    picture = np.full((*size, 3), BLANK, np.uint8)
    requests = np.split(np.arange(len(own)), range(CHUNK, len(own), CHUNK))
    for rows, images in zip(requests, own.stream(requests), strict=True):
        for row, image in zip(rows.tolist(), images, strict=True):
            picture[boxes[row]] = shrunk(image, picture[boxes[row]].shape[:2])
    return picture, origin, scale


def shrunk(image: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """An image uint8 (3, H, W) averaged down (or repeated up) to uint8 (h, w, 3)."""
    scaled = functional.interpolate(image[None].float(), size, mode="area")[0]
    pixels: np.ndarray = scaled.round().byte().permute(1, 2, 0).cpu().numpy()
    return pixels


def frame_of(coords: np.ndarray, edge: int) -> tuple[np.ndarray, float]:
    """Origin (2,) of the picture on the slide, and its pixels a pixel of level 0, at most 1."""
    origin = coords.min(0)
    extent = int((coords.max(0) + edge - origin).max())
    return origin, min(1.0, LONGEST_PX / extent)


def draw_heat_map(
    slide: str,
    attention: np.ndarray,
    coords: np.ndarray,
    *,
    title: str,
    size_px: int | None = None,
    patches: PatchSet | None = None,
) -> bytes:
    """PNG of a slide's attention: over the slide's pixels where there are patches, else alone.

    attention  float (N,), summing to 1
    coords     int64 (N, 2), left and top in pixels of level 0
    size_px    edge of a patch in the same pixels, where that is recorded
    """
    edge = patch_edge(slide, coords, size_px)
    if patches is not None:
        picture, origin, scale = slide_thumbnail(patches, slide)
    else:
        (origin, scale), picture = frame_of(coords, edge), None
    boxes, size = place_patches(coords, edge, origin, scale)
    shares = np.full(size if picture is None else picture.shape[:2], np.nan, np.float32)
    for box, share in zip(boxes, (attention * len(attention)).tolist(), strict=True):
        shares[box] = share
    if np.isnan(shares).all():
        raise InputError(
            f"{slide}: none of its features' patches lies where the patches of --data do; they are "
            "of another slide or another scale"
        )
    return render(picture, shares, title)


def render(picture: np.ndarray | None, shares: np.ndarray, title: str) -> bytes:
    """The PNG: the slide, and beside it the slide under its attention, with a colour bar."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "evaluate") from error
    panels = 1 if picture is None else 2
    height, width = shares.shape
    size = (6 * panels + 1.2, max(3.0, 6 * height / width) + 0.6)  # inches
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(title)
    for axis in axes:
        axis.set_axis_off()
        if picture is not None:
            axis.imshow(picture)
    shown = axes[-1].imshow(
        np.clip(shares, *SHARES),
        cmap="coolwarm",
        norm=LogNorm(*SHARES),
        alpha=1.0 if picture is None else 0.55,
        interpolation="nearest",
    )
    bar = figure.colorbar(shown, ax=list(axes), fraction=0.05, pad=0.02, extend="both")
    bar.set_ticks(TICKS, labels=[f"{tick:g}" for tick in TICKS])
    bar.set_label("attention, as a multiple of an even share")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def write_heat_map(
    folder: Path, slide: str, png: bytes, attention: np.ndarray, coords: np.ndarray
) -> Path:
    """Write the picture, and beside it a CSV of x, y and attention; returns the picture's path."""
    name = file_name(slide)
    shares = attention.tolist()
    rows = [[x, y, f"{s:.6g}"] for (x, y), s in zip(coords.tolist(), shares, strict=True)]
    write_table(folder / f"{name}.csv", ["x", "y", "attention"], rows)
    write_atomically(folder / f"{name}.png", png)
    return folder / f"{name}.png"


def chosen_slides(
    config: AbmilConfig, outcomes: Sequence[FoldOutcome], truths: Mapping[str, int]
) -> list[tuple[str, FoldOutcome]]:
    """Slides to draw, with the fold that tested them: those named, and some of every class.

    Of the others, folds and classes take turns.

    truths  class of every slide
    """
    tested: dict[str, FoldOutcome] = {}
    for outcome in outcomes:
        for slide in outcome.items:
            tested.setdefault(slide, outcome)
    count = Counter[tuple[int, int]]()
    order = []
    for slide, outcome in tested.items():
        key = (outcome.fold, truths[slide])
        order.append((count[key], *key, slide))
        count[key] += 1
    names = [*config.heat_map_slides, *(row[-1] for row in sorted(order)[: config.heat_maps])]
    return [(slide, tested[slide]) for slide in dict.fromkeys(names)]
