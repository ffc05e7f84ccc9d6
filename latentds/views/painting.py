"""Paint: which changes of colour and sharpness a view may see, how likely and how strong."""
# V views, B patches, N = V * B crops, D draws

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from latentds.core.compiling import Compiled
from latentds.views.boxes import DRAWS, spread
from latentds.views.colour import blur, grey, jitter, solarize, stain, where_chosen

Two = tuple[float, float]
Three = tuple[float, float, float]
PAINTED = tuple(DRAWS)[tuple(DRAWS).index("jitter_p") :]  # the draws that are about colour


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paint:
    """What views that are painted together may see; fields as MultiCrop has them.

    stain_p, blur, solarize  probabilities, one a view
    """

    stain: float
    stain_shift: float
    stain_p: tuple[float, ...]
    jitter: tuple[float, float, float, float]
    jitter_p: float
    grey: float
    blur: tuple[float, ...]
    blur_sigma: Two
    solarize: tuple[float, ...]
    mean: Three | None
    std: Three | None

    def __call__(self, crops: Tensor, *numbers: Tensor) -> Tensor:
        """Changed crops (V, B, 3, P, P) of crops in [0, 1].

        numbers  (V, B, D) or (V, B), in the order of PAINTED

        The order of the changes is DINO's, stain first as in OpenMidnight.
        """
        images = crops.flatten(0, 1)
        chances = {"stain_p": self.stain_p, "blur_p": self.blur, "solarize": self.solarize}
        drawn = {
            name: below(part, chances[name]) if name in chances else part.flatten(0, 1)
            for name, part in zip(PAINTED, numbers, strict=True)
        }
        if self.stain or self.stain_shift:
            scale = spread(drawn["stain"], (1 - self.stain, 1 + self.stain))
            shift = spread(drawn["stain_shift"], (-self.stain_shift, self.stain_shift))
            images = perhaps(images, self.stain_p, drawn["stain_p"], stain, scale, shift)
        if any(self.jitter):
            factors = jitter_factors(drawn["jitter"], self.jitter)
            chosen = drawn["jitter_p"] < self.jitter_p
            images = perhaps(images, (self.jitter_p,), chosen, jitter, factors)
        images = perhaps(images, (self.grey,), drawn["grey"] < self.grey, grey)
        sigma = spread(drawn["blur"], self.blur_sigma)
        images = perhaps(images, self.blur, drawn["blur_p"], blur, sigma)
        images = perhaps(images, self.solarize, drawn["solarize"], solarize)
        return normalize(images, self.mean, self.std).view(crops.shape)


def below(drawn: Tensor, probabilities: tuple[float, ...]) -> Tensor:
    """Which crops, bool (N,), draw a number below their view's probability; `drawn` (V, B)."""
    if len(set(probabilities)) == 1:
        return (drawn < probabilities[0]).flatten()
    return torch.cat([row < own for row, own in zip(drawn, probabilities, strict=True)])


def perhaps(
    images: Tensor,
    probabilities: tuple[float, ...],
    chosen: Tensor,
    change: Callable[..., Tensor],
    *numbers: Tensor,
) -> Tensor:
    """The images (N, 3, P, P), those of `chosen` changed; the probabilities of being chosen."""
    if max(probabilities) <= 0:
        return images
    if min(probabilities) >= 1:
        return change(images, *numbers)
    return where_chosen(images, chosen, change, *numbers)


def jitter_factors(drawn: Tensor, strength: tuple[float, float, float, float]) -> Tensor:
    """Factors (N, 4) of brightness, contrast, saturation, and shift of hue, as torchvision's."""
    limits = [(max(0.0, 1 - s), 1 + s) for s in strength[:3]] + [(-strength[3], strength[3])]
    return torch.stack([spread(drawn[:, i], limit) for i, limit in enumerate(limits)], 1)


def normalize(images: Tensor, mean: Three | None, std: Three | None) -> Tensor:
    """Images with the channels' mean taken off and divided by their deviation."""
    if mean is None and std is None:
        return images
    planes = [
        (plane - offset) / scale
        for plane, offset, scale in zip(
            images.unbind(1), mean or (0,) * 3, std or (1,) * 3, strict=True
        )
    ]
    return torch.stack(planes, 1)


@functools.cache
def compiled(paint: Paint) -> Callable[..., Tensor]:
    """The paint under torch.compile: one pass over the pixels where eager takes some forty."""
    return Compiled(paint)
