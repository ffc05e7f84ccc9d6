"""LatentCrops: global and local windows of latents, without decoding or resampling."""
# B patches, G global crops, L local crops, C latent channels, h w latent cells, n edge of a window
# in cells

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentds.core.randomness import uniform
from latentds.errors import ShapeError
from latentds.views.view_batch import COUNTS, Rule, Views, check_fields, is_chance

QUARTERS = 4
RULES: tuple[Rule, ...] = (
    COUNTS,
    ("global_cells local_cells align", lambda cells: cells >= 1, "at least 1"),
    ("flip drop", is_chance, "probabilities lie between 0 and 1"),
    ("noise", lambda noise: 0 <= noise < math.inf, "0 or a positive number"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentCrops:
    """Augmented windows of every patch's latents, each drawn from the patch's own seed.

    Call it with normalized latents float (B, C, h, w) on any device and seeds int64 (B,): `Views`
    of C channels. Windows are cut, never resized: a cell's numbers mean one scale. Nothing is done
    to colour, which no single channel is. Order: window, turn, flip, noise, channels left out.
    """

    globals: int = 2
    """Global windows of a patch."""
    locals: int = 8
    """Local windows of a patch."""
    global_cells: int = 28
    """Edge of a global window in cells: 224 px of an autoencoder of factor 8."""
    local_cells: int = 12
    """Edge of a local window in cells: 96 px."""
    align: int = 2
    """Windows start at multiples of so many cells, so that tokens of 2x2 cells are the patch's."""
    flip: float = 0.5
    """Probability of a mirrored window; what it decodes to is nearly the mirrored picture."""
    turns: bool = True
    """Turn windows by 0, 90, 180 or 270 degrees, as nearly."""
    noise: float = 0.2
    """Largest standard deviation of Gaussian noise, in those of a channel; drawn for every window
    from 0 up to it."""
    drop: float = 0.05
    """Probability that a channel of a window is left out: its mean everywhere."""

    reads: ClassVar[str] = "latents"  # what of a batch it takes: LatentLoader's `decode`

    def __post_init__(self) -> None:
        check_fields(self, RULES)

    def record(self) -> dict[str, Any]:
        """The augmentation's identity: plain JSON values, equal where the views are."""
        return {"kind": type(self).__name__, **dataclasses.asdict(self)}

    def __call__(self, latents: Tensor, seeds: Tensor) -> Views:
        """Views of latents float (B, C, h, w), drawn from seeds int64 (B,) on their device.

        raises  ShapeError for latents smaller than a window, or that are no latents
        """
        if latents.ndim != 4 or not latents.is_floating_point():
            raise ShapeError(
                f"latents are {latents.dtype} {tuple(latents.shape)}; floats (B, C, h, w) are "
                "wanted, as LatentLoader(decode='latents', normalize=True) gives them"
            )
        return Views(
            self.windows(latents, seeds, "global", self.globals, self.global_cells),
            self.windows(latents, seeds, "local", self.locals, self.local_cells),
        )

    def windows(self, latents: Tensor, seeds: Tensor, kind: str, count: int, cells: int) -> Tensor:
        """Windows (count, B, C, n, n) of one kind; none has shape (0, B, C, n, n)."""
        if not count:
            return latents.new_empty(0, *latents.shape[:2], cells, cells)
        if min(latents.shape[-2:]) < cells:
            height, width = latents.shape[-2:]
            raise ShapeError(
                f"latents of {width}x{height} cells, {kind} windows of {cells}; choose a smaller "
                f"{kind}_cells"
            )
        made = [self.window(latents, seeds, f"{kind} {n}", cells) for n in range(count)]
        return torch.stack(made)

    def window(self, latents: Tensor, seeds: Tensor, name: str, cells: int) -> Tensor:
        """One window (B, C, n, n) of every patch."""
        window = cut(latents, uniform(seeds, f"{name} window", 2), cells, self.align)
        draws = uniform(seeds, f"{name} turn", 2)
        quarters = (draws[:, 0] * QUARTERS).int() if self.turns else torch.zeros_like(seeds)
        window = oriented(window, quarters, draws[:, 1] < self.flip)
        if self.noise:
            window = noisy(window, seeds, name, self.noise)
        if self.drop:
            kept = uniform(seeds, f"{name} drop", window.shape[1]) >= self.drop
            window = window * kept[:, :, None, None].to(window.dtype)
        return window


def cut(latents: Tensor, draws: Tensor, cells: int, align: int) -> Tensor:
    """A window (B, C, n, n) of every patch, at a place of the grid of `align` cells.

    draws  float32 (B, 2) in [0, 1): how far down and right
    """
    places = latents.unfold(2, cells, align).unfold(3, cells, align)  # (B, C, down, right, n, n)
    down, right = ((draws[:, n] * places.shape[2 + n]).long() for n in (0, 1))
    return places[torch.arange(len(latents), device=draws.device), :, down, right]


def oriented(window: Tensor, quarters: Tensor, flips: Tensor) -> Tensor:
    """Square windows turned by quarters (B,) of a circle, then mirrored where `flips` (B,) says.

    Selections instead of indexing: a GPU need not be waited for.
    """
    window = choose(quarters % 2 == 1, window.transpose(2, 3), window)
    # a quarter turn is a transposition and a flip, half a turn two flips
    upside = (quarters == 1) | (quarters == 2)
    sideways = (quarters >= 2) ^ flips
    window = choose(upside, window.flip(2), window)
    return choose(sideways, window.flip(3), window)


def choose(which: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Of every patch the one tensor or the other, by `which` (B,)."""
    return torch.where(which.view(-1, 1, 1, 1), yes, no)


def noisy(window: Tensor, seeds: Tensor, name: str, most: float) -> Tensor:
    """Windows with Gaussian noise of a standard deviation between 0 and `most`.

    source  Box and Muller 1958
    """
    count = window[0].numel()
    draws = uniform(seeds, f"{name} noise", 2 * count)
    radius, angle = draws[:, :count], draws[:, count:]
    normal = (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)
    strength = most * uniform(seeds, f"{name} noise strength")
    return window + (strength * normal).view(window.shape).to(window.dtype)
