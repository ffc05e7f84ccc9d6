"""Random crops of pictures, each a function of seed, step and place in the batch alone.

All pictures lie in one row of pixels, on the device; a crop is gathered from it by an index that
turns and flips as well. So a GPU draws its own crops, and a CPU the same ones by the same code.
"""
# B crops, N pixels of all pictures, s pixels of a crop's edge

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SWAP_SHARE = 0.3  # of the colour-mixed crops whose channels change places
MIXING = 0.12  # standard deviation of a mixing matrix's entries
GAMMAS, GAINS = (0.7, 1.4), (0.9, 1.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How crops are drawn.

    half_scale_share  of the crops, taken at half resolution (area filter)
    stain_share       of the crops, whose colours are mixed
    """

    crop_px: int
    half_scale_share: float
    stain_share: float
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """What one crop is: a square of a picture, turned, flipped, its colours changed.

    start          of the picture in the row of pixels
    size           of the picture: height, width
    corner         of the square: top, left; a small picture goes on reflected at bottom and right
    scale          2 where the square is twice as large and averaged down
    mixing, gamma  of the colours; the identity and 1 where they stay
    gain           of the channels (3,)
    """

    start: int
    size: tuple[int, int]
    corner: tuple[int, int]
    scale: int
    turns: int
    is_flipped: bool
    mixing: np.ndarray
    gamma: float
    gain: np.ndarray


class Crops:
    """Pictures of several sources to draw crops from.

    pictures  by source, uint8 (H, W, 3)
    shares    of the crops by source, summing to 1
    config    of the crops for training
    device    that holds the pixels and makes the crops
    """

    def __init__(
        self,
        pictures: Mapping[str, Sequence[np.ndarray]],
        shares: Mapping[str, float],
        config: CropConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.shares = config, list(shares.values())
        self.sizes = [[picture.shape[:2] for picture in pictures[source]] for source in shares]
        ends = np.cumsum([h * w for source in self.sizes for h, w in source])
        counts = np.cumsum([len(source) for source in self.sizes])[:-1]
        self.starts = np.split(np.concatenate([[0], ends[:-1]]), counts)
        row = np.concatenate([p.reshape(-1, 3) for source in shares for p in pictures[source]])
        self.pixels_N3 = torch.from_numpy(row).to(device)

    def batch(self, step: int, places: Iterable[int], config: CropConfig | None = None) -> Tensor:
        """Crops (B, 3, s, s) in [0, 1] at these places of the step's global batch.

        config  where crops are to be drawn otherwise than for training
        """
        config = config or self.config
        draws = [self.draw(config, step, place) for place in places]
        images = [self.square(draw, config.crop_px) for draw in draws]
        return recoloured(torch.stack(images), draws)

    def draw(self, config: CropConfig, step: int, place: int) -> Draw:
        """What the crop at a place of a step is."""
        rng = np.random.default_rng([config.seed, step, place])
        source = int(rng.choice(len(self.shares), p=self.shares))
        index = int(rng.integers(len(self.sizes[source])))
        size = self.sizes[source][index]
        fits_half = min(size) >= 2 * config.crop_px
        scale = 2 if fits_half and rng.random() < config.half_scale_share else 1
        rooms = [max(length - scale * config.crop_px, 0) for length in size]
        top, left = (int(rng.integers(room + 1)) for room in rooms)
        turns, is_flipped = int(rng.integers(4)), bool(rng.random() < 0.5)
        mixing, gamma = np.eye(3), 1.0
        if rng.random() < config.stain_share:
            mixing, gamma = draw_colours(rng)
        return Draw(
            start=int(self.starts[source][index]),
            size=size,
            corner=(top, left),
            scale=scale,
            turns=turns,
            is_flipped=is_flipped,
            mixing=mixing,
            gamma=gamma,
            gain=rng.uniform(*GAINS, 3),
        )

    def square(self, draw: Draw, crop_px: int) -> Tensor:
        """The pixels (3, s, s) of a draw in [0, 1], turned and flipped, colours as they are."""
        line = torch.arange(draw.scale * crop_px, device=self.pixels_N3.device)
        rows, columns = (
            reflected(line + first, length)
            for first, length in zip(draw.corner, draw.size, strict=True)
        )
        index = draw.start + rows[:, None] * draw.size[1] + columns
        index = torch.rot90(index, draw.turns)
        index = index.flip(1) if draw.is_flipped else index
        image = self.pixels_N3[index].permute(2, 0, 1).float() / 255
        return functional.avg_pool2d(image, 2) if draw.scale == 2 else image


def reflected(places: Tensor, length: int) -> Tensor:
    """Places from 0 on, those beyond a length turned back at its last one."""
    return (length - 1) - ((length - 1) - places).abs()


def draw_colours(rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A matrix that mixes the channels a little, at times swapped, and a gamma."""
    channels = rng.permutation(3) if rng.random() < SWAP_SHARE else np.arange(3)
    return np.eye(3)[channels] + rng.normal(0, MIXING, (3, 3)), float(rng.uniform(*GAMMAS))


def recoloured(images: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Images (B, 3, s, s) in the colours of their draws."""
    mixing, gain = (
        torch.from_numpy(np.stack(values)).float().to(images.device)
        for values in ([draw.mixing for draw in draws], [draw.gain for draw in draws])
    )
    gamma = torch.tensor([draw.gamma for draw in draws]).to(images)
    images = torch.einsum("bij,bjhw->bihw", mixing, images).clamp(0, 1)
    return (images ** gamma.view(-1, 1, 1, 1) * gain[:, :, None, None]).clamp_(0, 1)
