"""Changes of colour and sharpness with numbers of each patch's own.

torchvision v2's arithmetic, from kornia where kornia has it; kornia's random classes and its
generator are not used.
"""
# N crops, H W pixels

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.errors import missing_extra

BLUR_TAPS = 9  # pixels of the blur's kernel, as in DINOv2
SOLARIZE_FROM = 128 / 255  # DINO's threshold of 128 for bytes
HUE_PLACES = (5.0, 3.0, 1.0)  # of red, green and blue on the circle of six


def kornia() -> Any:
    """The library, imported when a view needs it."""
    try:
        import kornia.color
        import kornia.enhance
        import kornia.filters
    except ModuleNotFoundError as error:
        raise missing_extra("kornia", "views") from error
    return kornia


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
    enhance = kornia().enhance.adjust
    brightness, contrast, saturation, hue = factors.to(images.dtype).unbind(1)
    images = enhance.adjust_brightness_accumulative(images, brightness)
    images = enhance.adjust_contrast_with_mean_subtraction(images, contrast)
    images = enhance.adjust_saturation_with_gray_subtraction(images, saturation)
    return shift_hue(images, hue)


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
    luminance: Tensor = kornia().color.rgb_to_grayscale(images)
    return luminance.expand_as(images)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of sigma (N,) pixels, borders reflected."""
    edge = min(images.shape[-2:])
    taps = min(BLUR_TAPS, 2 * edge - 1)  # a reflection is no longer than the image
    filters = kornia().filters  # its gaussian_blur2d makes the same kernel twice, once an axis
    kernel = filters.get_gaussian_kernel1d(taps, sigma[:, None])
    blurred: Tensor = filters.filter2d_separable(images.float(), kernel, kernel, "reflect")
    return blurred.to(images.dtype)  # rounded once, as there


def solarize(images: Tensor) -> Tensor:
    """Images with bright pixels inverted."""
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
