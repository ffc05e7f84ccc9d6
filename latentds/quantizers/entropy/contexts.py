"""Which frequency table codes a value: told by magnitudes that were decoded before it.

Where neighbours are large a value is large, in transforms of pictures as in learned latents. A
weighted sum of magnitudes around a cell, in its own channel and in channels before it, names one of
K tables: 11 to 20 % fewer bytes on H&E than one table a channel, and nothing to store a patch.
"""
# B patches, C channels (of a codebook or of a slice of it), h w cells, n cells of a phase,
# P parents of a channel, K classes

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PHASES = 3  # cells (even, even); (odd, odd), between four of those; the others, between four of all
CAP = 15  # magnitudes beyond count as this


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """The order in which a channel's cells are coded: phase by phase, each row by row.

    cells       int64 (h*w,): raster place of each
    inverse     int64 (h*w,): place in the scan of each raster place
    ends        where each phase ends in the scan
    neighbours  a phase: int64 (4, n) places in the scan; the four cells around each cell, those
                outside reflected; none for the first phase
    """

    cells: Tensor
    inverse: Tensor
    ends: tuple[int, int, int]
    neighbours: tuple[Tensor | None, Tensor | None, Tensor | None]

    def phase(self, number: int) -> slice:
        """Where a phase lies in the scan."""
        return slice(0 if number == 0 else self.ends[number - 1], self.ends[number])


@functools.lru_cache(maxsize=16)
def scan_of(height: int, width: int, device: torch.device) -> Scan:
    """The scan of channels of that size."""
    import torch

    places = scan_places(height, width)
    first, second = (torch.from_numpy(around).to(device) for around in places.neighbours)
    return Scan(
        cells=torch.from_numpy(places.cells).to(device),
        inverse=torch.from_numpy(places.inverse).to(device),
        ends=places.ends,
        neighbours=(None, first, second),
    )


class ScanPlaces(NamedTuple):
    """What `Scan` has, in NumPy's arrays; of `neighbours` the phases that have any."""

    cells: np.ndarray
    inverse: np.ndarray
    ends: tuple[int, int, int]
    neighbours: list[np.ndarray]


def scan_places(height: int, width: int) -> ScanPlaces:
    """The scan of channels of that size, without torch."""
    y, x = np.divmod(np.arange(height * width), width)
    phase = np.where(y % 2 != x % 2, 2, y % 2)
    cells = np.argsort(phase, kind="stable")
    inverse = np.argsort(cells)
    ends = np.cumsum(np.bincount(phase, minlength=PHASES))
    around = []
    for number, offsets in ((1, ((-1, -1), (-1, 1), (1, -1), (1, 1))),
                            (2, ((-1, 0), (0, -1), (0, 1), (1, 0)))):  # fmt: skip
        at = cells[phase[cells] == number]
        places = [
            inverse[reflect(y[at] + dy, height) * width + reflect(x[at] + dx, width)]
            for dy, dx in offsets
        ]
        around.append(np.stack(places))
    return ScanPlaces(cells, inverse, (int(ends[0]), int(ends[1]), int(ends[2])), around)


def reflect(places: np.ndarray, size: int) -> np.ndarray:
    """-1 becomes 1 and `size` becomes size - 2; a line of one cell has only its own place."""
    mirrored = np.where(places < 0, 1, np.where(places >= size, size - 2, places))
    reflected: np.ndarray = mirrored.clip(0, size - 1)
    return reflected


def blur(magnitudes: Tensor, scan: Scan, height: int, width: int) -> Tensor:
    """int32: 3x3 sums weighted 1 2 1, edge cells repeated outside.

    magnitudes  int32 (B, C, h*w) in scan order
    """
    lines = magnitudes.index_select(2, scan.inverse)
    lines = lines.view(*lines.shape[:2], height, width)
    return smooth(smooth(lines, 2), 3).flatten(2).index_select(2, scan.cells)


def smooth(values: Tensor, dim: int) -> Tensor:
    """Sums weighted 1 2 1 along a dimension, its ends repeated outside."""
    size = values.shape[dim]
    sums = 2 * values
    sums.narrow(dim, 1, size - 1).add_(values.narrow(dim, 0, size - 1))
    sums.narrow(dim, 0, size - 1).add_(values.narrow(dim, 1, size - 1))
    sums.narrow(dim, 0, 1).add_(values.narrow(dim, 0, 1))
    sums.narrow(dim, size - 1, 1).add_(values.narrow(dim, size - 1, 1))
    return sums


def around_of(magnitudes: Tensor, scan: Scan, phase: int) -> Tensor | None:
    """int32: four times the sum of the four cells around, None in the first phase.

    magnitudes  int32 (B, C, h*w) in scan order; the result is (B, C, n)

    Four times, so that it is on the scale of a blurred channel: 16 times a magnitude.
    """
    places = scan.neighbours[phase]
    if places is None:
        return None
    sums = magnitudes.index_select(2, places[0])
    for place in places[1:]:
        sums += magnitudes.index_select(2, place)
    return sums.mul_(4)


def activity(weights: Tensor, around: Tensor | None, parents: list[Tensor]) -> Tensor | int:
    """int32 (B, C, n): what values are expected to be, 1,024 times their magnitude.

    weights  int32 (P + 2, C, 1) of the phase: a constant, the cells around, the parents
    parents  P times int32 of the result's shape, the blurred channels
    """
    total: Tensor = weights[0]
    if around is not None:
        total = total + weights[1] * around
    for weight, blurred in zip(weights[2:], parents, strict=True):
        total = total + weight * blurred
    return total
