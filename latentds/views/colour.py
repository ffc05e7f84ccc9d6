"""Changes of colour and sharpness: which a view may see, with numbers of each patch's own.

torchvision v2's arithmetic, a factor a crop, as kornia has it; tests hold both to be equal.
"""
# V views, B patches, N = V * B crops, H W pixels, D draws

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from latentds.core.compiling import Compiled
from latentds.views.boxes import DRAWS, spread

Two = tuple[float, float]
Three = tuple[float, float, float]
PAINTED = tuple(DRAWS)[tuple(DRAWS).index("jitter_p") :]  # the draws that are about colour
BLUR_TAPS = 9  # pixels of the blur's kernel, as in DINOv2
SOLARIZE_FROM = 128 / 255  # DINO's threshold of 128 for bytes
HUE_PLACES = (5.0, 3.0, 1.0)  # of red, green and blue on the circle of six
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601


def where_chosen(
    images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *numbers: Tensor
) -> Tensor:
    """Images (N, 3, H, W) with `change(images, *numbers)` for those of `chosen`, bool (N,).

    On a CPU only those are computed; elsewhere all are, because asking how many there are would
    wait for the device.
    """
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(chosen[:, None, None, None], change(images, *numbers), images)
    places = chosen.nonzero()[:, 0]
    if not len(places):
        return images
    if len(places) == len(images):
        return change(images, *numbers)
    changed = change(images[places], *(part[places] for part in numbers))
    return images.index_copy(0, places, changed)


def jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order, by factors (N, 4).

    torchvision's ColorJitter draws an order a call. Every order of each crop's own would cost four
    times the arithmetic on a GPU, so there is one.
    """
    columns = factors.to(images.dtype)[..., None, None, None]
    brightness, contrast, saturation = columns[:, :3].unbind(1)
    images = (images * brightness).clamp(0, 1)
    mean = luminance(images).mean((-2, -1), keepdim=True)
    images = (images * contrast + mean * (1 - contrast)).clamp(0, 1)
    images = (images * saturation + luminance(images) * (1 - saturation)).clamp(0, 1)
    return shift_hue(images, factors[:, 3])


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Hue turned by `shift` (N,) of a circle, in float32.

    HSV keeps the largest and the smallest channel, so that only the position between them is
    computed: a quarter of the time of kornia's adjust_hue on a CPU, the same to 2e-6.
    """
    pixels = images.float()
    red, green, blue = pixels.unbind(1)
    high, low = pixels.amax(1), pixels.amin(1)
    span = high - low
    safe = torch.where(span == 0, 1.0, span)
    hue = torch.where(
        (red >= green) & (red >= blue),
        (green - blue) / safe,
        torch.where(green >= blue, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = hue + 6 * shift.float()[:, None, None]
    planes = [torch.remainder(hue + place, 6) for place in HUE_PLACES]
    shown = [high - span * torch.minimum(k, 4 - k).clamp(0, 1) for k in planes]
    return torch.stack(shown, 1).to(images.dtype)


def grey(images: Tensor) -> Tensor:
    """Three equal channels of the images' luminance."""
    return luminance(images).expand_as(images)


def luminance(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as one channel (N, 1, H, W)."""
    red, green, blue = (plane * part for plane, part in zip(images.unbind(1), LUMA, strict=True))
    return (red + green + blue)[:, None]


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of sigma (N,) pixels, borders reflected."""
    edge = min(images.shape[-2:])
    taps = min(BLUR_TAPS, 2 * edge - 1)  # a reflection is no longer than the image
    reach = taps // 2
    places = torch.arange(-reach, reach + 1, device=sigma.device, dtype=sigma.dtype)
    kernel = torch.exp(-places.square() / (2 * sigma.clamp(min=1e-3).square()[:, None]))
    kernel = (kernel / kernel.sum(1, keepdim=True)).float().repeat_interleave(3, 0)[:, None, None]
    planes = images.float().flatten(0, 1)[None]  # every channel of every crop has its own kernel
    across = functional.pad(planes, (reach, reach, 0, 0), mode="reflect")
    across = functional.conv2d(across, kernel, groups=len(kernel))
    down = functional.pad(across, (0, 0, reach, reach), mode="reflect")
    blurred = functional.conv2d(down, kernel.mT, groups=len(kernel))
    return blurred.view(images.shape).to(images.dtype)  # rounded once


def solarize(images: Tensor) -> Tensor:
    return torch.where(images >= SOLARIZE_FROM, 1 - images, images)


# Haematoxylin, eosin and DAB in rows: Ruifrok and Johnston 2001, as skimage has them.
STAINS_TO_RGB = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
RGB_TO_STAINS = tuple(map(tuple, np.linalg.inv(STAINS_TO_RGB).tolist()))
DARKEST = 1e-6  # skimage's: the unit of its densities is -log of it


def stain(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Haematoxylin, eosin and DAB densities times `scale` plus `shift`, (N, 3) each.

    source  Tellez et al. 2018, "Whole-slide mitosis detection"; densities in the unit of skimage's
            rgb2hed (since 0.18), where full black is about 1
    """
    dark = math.log(DARKEST)
    pixels = images.float().clamp(min=DARKEST).log() / dark
    densities = mixed(pixels, RGB_TO_STAINS).clamp(min=0)
    densities = densities * scale.float()[..., None, None] + shift.float()[..., None, None]
    changed: Tensor = (dark * mixed(densities, STAINS_TO_RGB)).exp().clamp(0, 1)
    return changed.to(images.dtype)


def mixed(planes: Tensor, rows: tuple[tuple[float, ...], ...]) -> Tensor:
    """Planes (N, 3, H, W) mixed by a 3x3 matrix from the right.

    By numbers, not by a tensor: bringing one to a GPU waits for it.
    """
    parts = planes.unbind(1)
    columns = [
        sum((part * weight for part, weight in zip(parts[1:], column[1:], strict=True)),
            start=parts[0] * column[0])
        for column in zip(*rows, strict=True)
    ]  # fmt: skip
    return torch.stack(columns, 1)


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
